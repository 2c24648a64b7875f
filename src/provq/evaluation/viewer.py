"""The script by which a page turns traces in space: the viewer of py2Dmol, and the lines that tell it what to draw.

The viewer is read from the installed package and becomes a part of the page. It draws on a plain canvas, so it needs no
WebGL, and fetches nothing.
"""

from importlib.metadata import PackageNotFoundError, distribution
from importlib.resources import files
from pathlib import Path

from provq.errors import UserError


def viewer_script() -> str:
    """The source of the viewer behind its licence, and that of `overlays.js`.

    Raises:
        UserError: If py2Dmol is not installed.
    """
    try:
        # The package itself is never imported: it would import all of IPython.
        package = distribution("py2Dmol")
        viewer = Path(str(package.locate_file("py2Dmol/resources/viewer-mol.min.js"))).read_text(encoding="utf-8")
    except (PackageNotFoundError, OSError) as error:
        raise UserError(
            f"a page that shows structures needs py2Dmol ({error}): pip install 'provq[protein]'"
        ) from error
    licence = package.read_text("licenses/LICENSE") or ""
    return "\n".join([licence, viewer, files("provq.evaluation").joinpath("overlays.js").read_text(encoding="utf-8")])
