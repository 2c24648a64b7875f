"""Pictures through a tokenizer and back."""

from collections.abc import Sequence
from pathlib import Path

from provq.commands.pictures import Pictures, Places
from provq.errors import UserError
from provq.files import write_whole
from provq.modalities.image.pixels import contact_sheet, to_png
from provq.modalities.image.tokens import decode_picture, encode_picture
from provq.ops.modes import evaluating
from provq.tokenizer import Tokenizer, opened
from provq.training.log import advancing, show_skipped

_MOST_ON_A_SHEET = 64


def reconstruct(tokenizer: Tokenizer | str | Path, inputs: Sequence[str], *, out: str | Path) -> list[Path]:
    """Write what comes back of pictures when they pass through tokens.

    Args:
        tokenizer: The tokenizer, a saved one, or the folder of a run.
        inputs: Pictures, folders, tars, patterns of tars.
        out: A file that ends in .png, for one sheet with each original beside its reconstruction; or a folder, for
            one PNG a picture, the same that `encode` and `decode` make.

    Returns:
        The files that were written.

    Raises:
        UserError: A path is missing, no picture can be read, or there are too many for a sheet.
    """
    tokenizer = opened(tokenizer)
    out = Path(out)
    pictures = Pictures(inputs)
    on_sheet = out.suffix.lower() == ".png"
    if on_sheet and len(pictures) > _MOST_ON_A_SHEET:
        raise UserError(
            f"{len(pictures)} pictures are too many for one sheet, {_MOST_ON_A_SHEET} fit; "
            f"give a folder, such as --out {out.with_suffix('')}, or fewer pictures"
        )
    places = Places(out, ".png")
    rows, written = [], []
    for key, picture in advancing(pictures, len(pictures), "reconstruct"):
        with evaluating(tokenizer):
            made = decode_picture(tokenizer, encode_picture(tokenizer, picture, fingerprint=""))
        if on_sheet:
            rows.append([picture, made])
        else:
            written.append(places.of(key))
            write_whole(written[-1], to_png(made))
    if on_sheet:
        write_whole(out, to_png(contact_sheet(rows)))
        written = [out]
    show_skipped(pictures.skipped)
    return written
