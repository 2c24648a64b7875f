"""The chains of files as a benchmark sees them, each read and encoded once however many tasks ask for it."""

from pathlib import Path
from typing import NamedTuple, final

from jaxtyping import Int
from torch import Tensor

from provq.errors import UserError
from provq.modalities.protein.benchmark.subjects import Subject
from provq.modalities.protein.reading import read_structure
from provq.modalities.protein.structure import Backbone


class Encoded(NamedTuple):
    """A chain, and the code of each residue, -1 where it has none."""

    backbone: Backbone
    codes: Int[Tensor, " length"]


@final
class EncodedChains:
    """Chains by the files that hold them.

    Args:
        subject: What encodes them.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._files: dict[Path, tuple[Encoded, ...]] = {}

    def all_of(self, path: Path) -> tuple[Encoded, ...]:
        """All chains of a file.

        Raises:
            UserError: The file cannot be read.
        """
        if path not in self._files:
            backbones = read_structure(path).backbones
            self._files[path] = tuple(Encoded(backbone, self.subject.encode(backbone)) for backbone in backbones)
        return self._files[path]

    def one_of(self, path: Path) -> Encoded:
        """The chain of a file that holds one.

        Raises:
            UserError: The file cannot be read, or holds several chains.
        """
        chains = self.all_of(path)
        if len(chains) != 1:
            raise UserError(
                f"{path}: it holds {len(chains)} chains, and one is wanted; write it into a file of its own"
            )
        return chains[0]
