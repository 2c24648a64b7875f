"""The chains of files as a benchmark sees them, each read and encoded once however many tasks ask for it."""

from pathlib import Path
from typing import NamedTuple, final

from provq.errors import UserError
from provq.modalities.protein.benchmark.subjects import Subject, Tokens
from provq.modalities.protein.reading import read_structure
from provq.modalities.protein.structure import Backbone


class Encoded(NamedTuple):
    """A chain, and the token of each residue: a code, -1 where it has none, or a vector, NaN where it has none."""

    backbone: Backbone
    tokens: Tokens


@final
class EncodedChains:
    """Chains by the files that hold them.

    Args:
        subject: What encodes them.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._backbones: dict[Path, tuple[Backbone, ...]] = {}
        self._tokens: dict[tuple[Path, int], Tokens] = {}

    def all_of(self, path: Path) -> tuple[Encoded, ...]:
        """All chains of a file.

        Raises:
            UserError: The file cannot be read.
        """
        return tuple(self._encoded(path, place) for place in range(len(self._read(path))))

    def one_of(self, path: Path) -> Encoded:
        """The chain of a file that holds one; of one that holds several, the one that its name ends in: 1ABC_B.pdb.

        Raises:
            UserError: The file cannot be read, or it is not clear which of its chains is meant.
        """
        backbones = self._read(path)
        named = path.name.partition(".")[0].rpartition("_")[2]
        places = [place for place, each in enumerate(backbones) if len(backbones) == 1 or each.chain == named]
        if len(places) != 1:
            raise UserError(
                f"{path}: it holds {len(backbones)} chains, and one is wanted; write it into a file of its own, "
                "or let the name of the file end in _ and that of the chain"
            )
        return self._encoded(path, places[0])

    def _read(self, path: Path) -> tuple[Backbone, ...]:
        if path not in self._backbones:
            self._backbones[path] = read_structure(path).backbones
        return self._backbones[path]

    def _encoded(self, path: Path, place: int) -> Encoded:
        """One chain of a file; of entries of the PDB, which may have dozens, the others are not encoded."""
        backbone = self._read(path)[place]
        if (path, place) not in self._tokens:
            self._tokens[path, place] = self.subject.encode(backbone)
        return Encoded(backbone, self._tokens[path, place])
