"""Compiles native code into the package; where nothing can compile it, the package is pure Python, and slower."""

import os
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = "src/provq/ops/native"
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-shared", "-pthread"]


class NativeCode(BuildHookInterface):
    """Runs for wheels and for editable installations; the latter find each library beside its source."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Build a library of each source, and say that the wheel is for this platform; any Python will do."""
        for source in sorted(Path(self.root, SOURCES).glob("*.cpp")):
            library = source.with_suffix(".so")
            fault = compiled(source, library)
            if fault:
                library.unlink(missing_ok=True)  # of an older source
                self.app.display_warning(f"provq is built without {library.name} and slower on a CPU: {fault}")
                continue
            build_data["artifacts"].append(library.relative_to(self.root).as_posix())
            build_data["pure_python"] = False
            build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")


def compiled(source: Path, library: Path) -> str:
    """Compile with `$CXX` or the first C++ compiler on the path; returns what is in the way, or nothing."""
    compiler = (
        shlex.split(os.environ.get("CXX", "")) or [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
    )
    if not compiler:
        return "there is no C++ compiler"
    unfinished = library.with_suffix(".tmp")
    try:
        command = [*compiler, *FLAGS, str(source), "-o", str(unfinished), "-ldl"]
        subprocess.run(command, check=True, capture_output=True, text=True)
        unfinished.replace(library)
    except OSError as error:
        return str(error)
    except subprocess.CalledProcessError as error:
        return f"{shlex.join(command)}\n{error.stderr}"
    finally:
        unfinished.unlink(missing_ok=True)
    return ""
