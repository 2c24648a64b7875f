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
        """The chain of a file that holds one; of one that holds several, the one that its name ends in: 1ABC_B.pdb.

        Raises:
            UserError: The file cannot be read, or it is not clear which of its chains is meant.
        """
        chains = self.all_of(path)
        if len(chains) == 1:
            return chains[0]
        named = path.name.partition(".")[0].rpartition("_")[2]
        found = [chain for chain in chains if chain.backbone.chain == named]
        if len(found) != 1:
            raise UserError(
                f"{path}: it holds {len(chains)} chains, and one is wanted; write it into a file of its own, "
                "or let the name of the file end in _ and that of the chain"
            )
        return found[0]
