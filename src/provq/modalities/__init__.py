"""Kinds of data, each a plug-in in a folder of its own that reads top to bottom as its data flows."""

from provq.modalities.base import Modality
from provq.modalities.files import ItemFiles
from provq.modalities.image.files import PictureFiles
from provq.modalities.image.images import Images
from provq.modalities.protein.files import StructureFiles
from provq.modalities.protein.proteins import Proteins
from provq.tokenizer import Tokenizer

KINDS: dict[str, type[Modality]] = {"image": Images, "protein": Proteins}

__all__ = ["KINDS", "Images", "Modality", "Proteins", "files_of"]


def files_of(tokenizer: Tokenizer) -> ItemFiles:
    """The files of the kind of data that a tokenizer is for; pictures, where its metadata do not say."""
    kind = tokenizer.metadata.get("data", {}).get("kind")
    return StructureFiles(tokenizer) if kind == "protein" else PictureFiles(tokenizer)
