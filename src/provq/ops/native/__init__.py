"""What `hatch_build.py` compiles when the package is installed, where there is a compiler."""

import ctypes
import warnings
from pathlib import Path


def loaded(library: Path) -> ctypes.CDLL | None:
    """A library, or nothing where it was not compiled, or for another machine; the latter is told."""
    if not library.exists():
        return None
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        warnings.warn(
            f"{library.name} was compiled for another machine, torch does its work more slowly: {error}", stacklevel=2
        )
        return None
