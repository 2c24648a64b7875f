"""Where protein chains lie: structure files, folders of them, and synthetic ones for a machine that has none.

DATA --read_chains--> chains, or why a file has none --Crops, WholeChains--> items
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from provq.data import Item, Items, Skipped, mixed_seed
from provq.errors import UsageError, UserError, nearest
from provq.modalities.protein.reading import read_structure, structure_files
from provq.modalities.protein.synthetic import synthetic_backbone
from provq.training.log import advancing

Split = Literal["train", "val"]

SYNTHETIC = "embedded:synthetic"
_SYNTHETIC_CHAINS = {"train": 512, "val": 64}
_SYNTHETIC_LENGTHS = (40, 160)


class Chain(NamedTuple):
    """One chain: the name by which its owner knows it, and its backbone in angstrom, NaN where an atom is missing.

    `amino_acids` are those of `Backbone`, -1 where one is unknown.
    """

    key: str
    coordinates: Float[Tensor, "length 4 3"]
    amino_acids: Int[Tensor, " length"]


def read_chains(data: str, *, split: Split) -> list[Chain | Skipped]:
    """All chains of some data, in the order of the names of their files; a file that cannot be read has a reason.

    Args:
        data: A structure file, a folder with structure files at any depth, or "embedded:synthetic".
        split: Which part of embedded data.

    Raises:
        UserError: There is no such place, or no structure file in it.
        UsageError: There are no embedded data of that name.
    """
    if data.startswith("embedded:"):
        if data != SYNTHETIC:
            raise UsageError(f"no embedded chains are called {data!r}; {nearest(data, (SYNTHETIC,))}")
        return list(_synthetic_chains(split))
    files = structure_files(Path(data))
    chains: list[Chain | Skipped] = []
    for name, path in advancing(files, len(files), "read structures"):
        chains += _chains_of(path, name)
    return chains


@final
class WholeChains(Items):
    """Chains as they are.

    Args:
        chains: What `read_chains` gave.
    """

    def __init__(self, chains: Sequence[Chain | Skipped]) -> None:
        self.chains = chains

    def __len__(self) -> int:
        return len(self.chains)

    def item(self, index: int, epoch: int) -> Item | Skipped:
        """The chain at `index`, the same in every epoch."""
        chain = self.chains[index]
        if isinstance(chain, Skipped):
            return chain
        return Item(chain.coordinates, -1, chain.key, classes=chain.amino_acids)


@final
class Crops(Items):
    """Windows of chains, another one in each epoch.

    Args:
        chains: What `read_chains` gave.
        length: Residues of a window; a shorter chain is taken whole.
        seed: Fixes where the windows begin.
    """

    def __init__(self, chains: Sequence[Chain | Skipped], *, length: int, seed: int) -> None:
        self.chains = chains
        self.length = length
        self.seed = seed

    def __len__(self) -> int:
        return len(self.chains)

    def item(self, index: int, epoch: int) -> Item | Skipped:
        """A window of the chain at `index`, fixed by the seed and the epoch."""
        chain = self.chains[index]
        if isinstance(chain, Skipped):
            return chain
        places = max(1, len(chain.coordinates) - self.length + 1)
        first = mixed_seed(self.seed, epoch, index) % places
        window = slice(first, first + self.length)
        return Item(chain.coordinates[window], -1, chain.key, classes=chain.amino_acids[window])


def _chains_of(path: Path, name: str) -> list[Chain | Skipped]:
    try:
        backbones = read_structure(path).backbones
    except UserError as error:
        return [Skipped(name, str(error))]
    found: list[Chain | Skipped] = []
    for backbone in backbones:
        key = name if len(backbones) == 1 else f"{name}:{backbone.chain}"
        if bool(backbone.complete.any()):
            found.append(Chain(key, backbone.coordinates, backbone.amino_acids))
        else:
            found.append(Skipped(key, "no residue has N, CA and C"))
    return found


def _synthetic_chains(split: Split) -> list[Chain]:
    shortest, longest = _SYNTHETIC_LENGTHS
    chains = []
    for number in range(_SYNTHETIC_CHAINS[split]):
        seed = mixed_seed(0 if split == "train" else 1, number)
        length = shortest + seed % (longest - shortest + 1)
        # That all are alanines says nothing, and is nothing to learn.
        unknown = torch.full((length,), -1)
        chains.append(Chain(f"synthetic-{split}-{number}", synthetic_backbone(length, seed).coordinates, unknown))
    return chains
