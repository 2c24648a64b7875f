"""Pictures in the hands of a tokenizer: to token files, back, and to sheets beside their reconstructions."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import final

from PIL import Image

from provq.errors import UsageError, UserError
from provq.files import write_whole
from provq.modalities.files import ItemFiles, Places, Reconstructions, check_made_by, token_files
from provq.modalities.image.pixels import UnreadableImage, contact_sheet, to_png
from provq.modalities.image.sources import ImageSource, open_source
from provq.modalities.image.tokens import SUFFIX, decode_picture, encode_picture, read_tokens, write_tokens
from provq.ops.modes import evaluating
from provq.training.log import advancing, show_skipped

_MOST_ON_A_SHEET = 64


@final
class PictureFiles(ItemFiles):
    """Pictures keep their size. An unreadable one is skipped and named at the end."""

    def encode(self, inputs: Sequence[str], out: Path) -> list[Path]:
        """Write one token file a picture."""
        fingerprint = self.tokenizer.fingerprint
        pictures = Pictures(inputs)
        places = Places(out, SUFFIX)
        written = []
        for key, picture in advancing(pictures, len(pictures), "encode"):
            with evaluating(self.tokenizer):
                tokens = encode_picture(self.tokenizer, picture, fingerprint)
            written.append(places.of(key))
            write_tokens(written[-1], tokens)
        show_skipped(pictures.skipped)
        return written

    def decode(self, tokens: Sequence[str], out: Path) -> list[Path]:
        """Write one PNG picture a token file."""
        fingerprint = self.tokenizer.fingerprint
        files = token_files(tokens, SUFFIX)
        places = Places(out, ".png")
        written = []
        for path, key in advancing(files.items(), len(files), "decode"):
            made = read_tokens(path)
            check_made_by(path, made.fingerprint, fingerprint)
            written.append(places.of(key.removesuffix(SUFFIX)))
            with evaluating(self.tokenizer):
                picture = decode_picture(self.tokenizer, made)
            write_whole(written[-1], to_png(picture))
        return written

    def reconstruct(self, inputs: Sequence[str], out: Path) -> Reconstructions:
        """Write one PNG a picture into a folder, or one sheet with all of them beside the originals into a PNG file."""
        pictures = Pictures(inputs)
        on_sheet = out.suffix.lower() == ".png"
        if on_sheet and len(pictures) > _MOST_ON_A_SHEET:
            raise UserError(
                f"{len(pictures)} pictures are too many for one sheet, {_MOST_ON_A_SHEET} fit; "
                f"give a folder, such as --out {out.with_suffix('')}, or fewer pictures"
            )
        places = Places(out, ".png")
        sheet, written = [], []
        for key, picture in advancing(pictures, len(pictures), "reconstruct"):
            with evaluating(self.tokenizer):
                made = decode_picture(self.tokenizer, encode_picture(self.tokenizer, picture, fingerprint=""))
            if on_sheet:
                sheet.append([picture, made])
            else:
                written.append(places.of(key))
                write_whole(written[-1], to_png(made))
        if on_sheet:
            write_whole(out, to_png(contact_sheet(sheet)))
            written = [out]
        show_skipped(pictures.skipped)
        return Reconstructions(written, [])


class Pictures:
    """The pictures under several paths, each with a name that no other has.

    Args:
        inputs: Pictures, folders, tars, patterns of tars.

    Attributes:
        skipped: Names of pictures that could not be read, with the reason; it fills while they are read.

    Raises:
        UserError: A path is missing or holds no pictures, or two pictures have one name.
    """

    def __init__(self, inputs: Sequence[str]) -> None:
        if not inputs:
            raise UsageError("no input: give pictures, folders or tars")
        self.skipped: dict[str, str] = {}
        self._places: dict[str, tuple[ImageSource, int]] = {}
        for text in inputs:
            source = open_source(text, split="val", size=32)
            for index in range(len(source)):
                key = source.key(index).replace(":", "/")
                if key in self._places:
                    raise UserError(f"two pictures are called {key!r}; give the folder that holds both, or two calls")
                self._places[key] = (source, index)

    def __len__(self) -> int:
        return len(self._places)

    def __iter__(self) -> Iterator[tuple[str, Image.Image]]:
        for key, (source, index) in self._places.items():
            try:
                yield key, source.read(index)
            except UnreadableImage as error:
                self.skipped[key] = str(error)
        if len(self.skipped) == len(self._places):
            key, reason = next(iter(self.skipped.items()))
            raise UserError(f"none of the {len(self)} pictures can be read; the first: {key}: {reason}")
