"""What the benchmark measures: a codebook, and the code of each residue of a chain. Tokenizers of all kinds fit this.

Two structural alphabets stand beside those that are trained: 3Di and Protein Blocks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from provq.errors import UserError
from provq.modalities.protein.structure import ATOMS, Backbone
from provq.ops.modes import evaluating
from provq.tokenizer import Tokenizer, opened

if TYPE_CHECKING:
    from biotite.structure import AtomArray

# Of the 20 states of 3Di (van Kempen et al. 2024, 10.1038/s41587-023-01773-0), in the order of their letters.
_CENTROIDS_OF_3DI = (
    *((-1.0729, -0.3600), (-0.1356, -1.8914), (0.4948, -0.4205), (-0.9874, 0.8128), (-1.6621, -0.4259)),
    *((2.1394, 0.0486), (1.5558, -0.1503), (2.9179, 1.1437), (-2.8814, 0.9956), (-1.1400, -2.0068)),
    *((3.2025, 1.7356), (1.7769, -1.3037), (0.6901, -1.2554), (-1.1061, -1.3397), (2.1495, -0.8030)),
    *((2.3060, -1.4988), (2.5522, 0.6046), (0.7786, -2.1660), (-2.3030, 0.3813), (1.0290, 0.8772)),
)


class Subject(ABC):
    """Something that gives each residue of a chain a code.

    Attributes:
        name: What tables call it.
        identity: What tells it from all that give other codes.
        codebook: The vectors that codes stand for.
    """

    name: str
    identity: str
    codebook: Float[Tensor, "codes dim"]

    @abstractmethod
    def encode(self, backbone: Backbone) -> Int[Tensor, " length"]:
        """The code of each residue, -1 where it has none."""


@final
class TokenizerSubject(Subject):
    """A tokenizer of ours.

    Args:
        tokenizer: The tokenizer, a saved one, or the folder of a run.

    Raises:
        UserError: It cannot be read, is not for proteins, or does not give each residue one code.
    """

    def __init__(self, tokenizer: Tokenizer | str | Path) -> None:
        self.name = tokenizer.fingerprint if isinstance(tokenizer, Tokenizer) else Path(tokenizer).name
        self._tokenizer = opened(tokenizer)
        self.identity = self._tokenizer.fingerprint
        kind = self._tokenizer.metadata.get("data", {}).get("kind", "unknown")
        if kind != "protein":
            raise UserError(f"{self.name} is a tokenizer of data of kind {kind!r}; the benchmark is of proteins")
        sizes = self._tokenizer.codebook_sizes
        if len(sizes) != 1:
            raise UserError(f"{self.name} gives a residue {len(sizes)} codes; the benchmark is of one codebook")
        with torch.no_grad():
            codes = torch.arange(sizes[0], device=self._tokenizer.quantizer.hardness.device)
            self.codebook = self._tokenizer.quantizer.lookup(codes).float().cpu()

    def encode(self, backbone: Backbone) -> Int[Tensor, " length"]:
        """The hard token of each residue, -1 where it lacks N, CA or C."""
        device = self._tokenizer.quantizer.hardness.device
        with evaluating(self._tokenizer):
            return self._tokenizer.encode(backbone.coordinates[None].to(device))[0].cpu()


@final
class ThreeDi(Subject):
    """The alphabet of Foldseek (10.1038/s41587-023-01773-0) as biotite has it: 20 states, centroids of 2 dimensions.

    It also sees CB, and places one where a residue has none. A residue without neighbours has the state D.
    """

    name = identity = "3di"

    def __init__(self) -> None:
        _require_biotite(self.name)
        self.codebook = torch.tensor(_CENTROIDS_OF_3DI)

    def encode(self, backbone: Backbone) -> Int[Tensor, " length"]:
        """The state of each residue."""
        from biotite.structure.alphabet import to_3di

        (sequence,), _ = to_3di(atoms_of(backbone))
        return torch.from_numpy(sequence.code.astype("int64"))


@final
class ProteinBlocks(Subject):
    """Sixteen shapes of five residues (de Brevern et al. 2000) as biotite has them: eight angles, as cosines and sines.

    The two residues at either end of a chain have none, nor have those near a missing atom.
    """

    name = identity = "protein-blocks"

    def __init__(self) -> None:
        _require_biotite(self.name)
        from biotite.structure.alphabet.pb import PB_ANGLES

        angles = torch.from_numpy(PB_ANGLES).deg2rad().float()
        self.codebook = torch.cat((angles.cos(), angles.sin()), 1)

    def encode(self, backbone: Backbone) -> Int[Tensor, " length"]:
        """The block of each residue, -1 where there is none."""
        from biotite.structure.alphabet import to_protein_blocks

        (sequence,), _ = to_protein_blocks(atoms_of(backbone))
        codes = torch.from_numpy(sequence.code.astype("int64"))
        return torch.where(codes < len(self.codebook), codes, -1)


ALPHABETS: dict[str, type[ThreeDi] | type[ProteinBlocks]] = {each.name: each for each in (ThreeDi, ProteinBlocks)}


def subject_of(name: str | Path | Tokenizer) -> Subject:
    """The alphabet of a name, or the tokenizer that is saved there.

    Raises:
        UserError: There is neither, or biotite is not installed.
    """
    if isinstance(name, str) and name in ALPHABETS:
        return ALPHABETS[name]()
    return TokenizerSubject(name)


def _require_biotite(name: str) -> None:
    try:
        import biotite.structure.alphabet  # noqa: F401
    except ImportError as error:
        raise UserError(f"{name} needs biotite ({error}): pip install biotite") from error


def atoms_of(backbone: Backbone) -> AtomArray:
    """A chain as biotite has it, residues numbered from 1; atoms that are missing are not there."""
    import numpy as np
    from biotite.structure import AtomArray

    length = len(backbone)
    c_betas = backbone.c_betas if backbone.c_betas is not None else torch.full((length, 3), torch.nan)
    coordinates = torch.cat((backbone.coordinates, c_betas[:, None]), 1).reshape(-1, 3).numpy()
    names = (*ATOMS, "CB")
    array = AtomArray(length * len(names))
    array.coord = coordinates
    array.atom_name = np.tile(names, length)
    array.res_id = np.repeat(np.arange(1, length + 1), len(names))
    array.res_name = np.repeat([residue.name for residue in backbone.residues], len(names))
    array.chain_id[:] = "A"
    return array[np.isfinite(coordinates).all(1)]
