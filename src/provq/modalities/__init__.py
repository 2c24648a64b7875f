"""Kinds of data, each a plug-in in a folder of its own that reads top to bottom as its data flows."""

from provq.modalities.base import Modality
from provq.modalities.image.images import Images
from provq.modalities.protein.proteins import Proteins

KINDS: dict[str, type[Modality]] = {"image": Images, "protein": Proteins}

__all__ = ["KINDS", "Images", "Modality", "Proteins"]
