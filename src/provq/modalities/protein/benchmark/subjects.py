"""What the benchmark measures: what stands for each residue of a chain. Tokenizers of all kinds fit this.

A subject with a codebook gives codes, one without gives vectors; `vectors_of` makes vectors of both, and the tasks look
at these. Two structural alphabets stand beside what is trained: 3Di and Protein Blocks.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, final, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding

from provq.errors import UserError
from provq.modalities.protein.structure import ATOMS, Backbone
from provq.modalities.protein.synthetic import synthetic_backbone
from provq.ops.modes import evaluating
from provq.tokenizer import Tokenizer, opened

if TYPE_CHECKING:
    from biotite.structure import AtomArray

Tokens: TypeAlias = Int[Tensor, "*batch"] | Float[Tensor, "*batch dim"]

# Of the 20 states of 3Di (van Kempen et al. 2024, 10.1038/s41587-023-01773-0), in the order of their letters.
_CENTROIDS_OF_3DI = (
    *((-1.0729, -0.3600), (-0.1356, -1.8914), (0.4948, -0.4205), (-0.9874, 0.8128), (-1.6621, -0.4259)),
    *((2.1394, 0.0486), (1.5558, -0.1503), (2.9179, 1.1437), (-2.8814, 0.9956), (-1.1400, -2.0068)),
    *((3.2025, 1.7356), (1.7769, -1.3037), (0.6901, -1.2554), (-1.1061, -1.3397), (2.1495, -0.8030)),
    *((2.3060, -1.4988), (2.5522, 0.6046), (0.7786, -2.1660), (-2.3030, 0.3813), (1.0290, 0.8772)),
)


class Subject(ABC):
    """Something that gives each residue of a chain a code, or a vector.

    Attributes:
        name: What tables call it.
        identity: What tells it from all that give other tokens.
        family: What is alike of subjects that differ in the number of codes alone; None where there is no such thing.
        codebook: The vectors that codes stand for; None where there are no codes.
    """

    name: str
    identity: str
    family: str | None = None
    codebook: Float[Tensor, "codes dim"] | None

    @abstractmethod
    def encode(self, backbone: Backbone) -> Tokens:
        """The code of each residue, -1 where it has none; or its vector, NaN where it has none."""


@runtime_checkable
class ForeignTokenizer(Protocol):
    """What somebody else's tokenizer needs to be measured.

    Attributes:
        codebook: The vectors that codes stand for, (codes, dim), as a tensor, an array or lists.
    """

    codebook: Any

    def encode(self, backbone: Backbone) -> Any:
        """The code of each residue, -1 where it has none, as a tensor, an array or a list of whole numbers."""


def vectors_of(codebook: Float[Tensor, "codes dim"] | None, tokens: Tokens) -> Float[Tensor, "*batch dim"]:
    """What tokens stand for: NaN where there is none.

    Args:
        codebook: The vectors of codes; None where the tokens are vectors.
        tokens: Codes or vectors.
    """
    if codebook is None:
        return tokens
    return torch.where((tokens >= 0)[..., None], embedding(tokens.clamp_min(0), codebook), torch.nan)


@final
class TokenizerSubject(Subject):
    """A tokenizer of ours.

    Args:
        tokenizer: The tokenizer, a saved one, or the folder of a run.

    Raises:
        UserError: It cannot be read, is not for proteins, or does not give each residue one code.
    """

    def __init__(self, tokenizer: Tokenizer | str | Path) -> None:
        self.name, self._tokenizer = _of_proteins(tokenizer)
        self.identity = self._tokenizer.fingerprint
        self.family = _family_of(self._tokenizer)
        sizes = self._tokenizer.codebook_sizes
        if len(sizes) != 1:
            raise UserError(
                f"{self.name} gives a residue {len(sizes)} codes; the benchmark is of one codebook, "
                "or of continuous features (--continuous)"
            )
        with torch.no_grad():
            codes = torch.arange(sizes[0], device=self._tokenizer.quantizer.hardness.device)
            self.codebook = self._tokenizer.quantizer.lookup(codes).float().cpu()

    def encode(self, backbone: Backbone) -> Int[Tensor, " length"]:
        """The hard token of each residue, -1 where it lacks N, CA or C."""
        device = self._tokenizer.quantizer.hardness.device
        with evaluating(self._tokenizer):
            return self._tokenizer.encode(backbone.coordinates[None].to(device))[0].cpu()


@final
class ForeignSubject(Subject):
    """Somebody else's tokenizer: called by the name of its class, known by its codebook and its codes of a test chain.

    Args:
        tokenizer: The tokenizer.

    Raises:
        UserError: Its codebook is no matrix of finite numbers, or it does not give each residue one of its codes.
    """

    codebook: Float[Tensor, "codes dim"]

    def __init__(self, tokenizer: ForeignTokenizer) -> None:
        self.name = type(tokenizer).__name__
        self._tokenizer = tokenizer
        self.codebook = torch.as_tensor(tokenizer.codebook).detach().float().cpu()
        if self.codebook.ndim != 2 or not self.codebook.numel() or not self.codebook.isfinite().all():
            raise UserError(
                f"{self.name}.codebook: expected finite numbers, a row a code, got shape {tuple(self.codebook.shape)}"
            )
        codes = self.encode(synthetic_backbone(length=64, seed=0))
        told = self.codebook.numpy().tobytes() + codes.numpy().tobytes()
        self.identity = f"{self.name}-{hashlib.sha256(told).hexdigest()[:12]}"

    def encode(self, backbone: Backbone) -> Int[Tensor, " length"]:
        """The code of each residue, -1 where it has none."""
        codes = torch.as_tensor(self._tokenizer.encode(backbone)).detach().cpu()
        if codes.shape != (len(backbone),) or codes.is_floating_point():
            raise UserError(
                f"{self.name}.encode: expected a whole number for each of {len(backbone)} residues, got "
                f"{codes.dtype} of shape {tuple(codes.shape)}; -1 is for a residue without a code"
            )
        if len(codes) and not -1 <= int(codes.min()) <= int(codes.max()) < len(self.codebook):
            raise UserError(
                f"{self.name}.encode: codes are from 0 to {len(self.codebook) - 1}, or -1, got {int(codes.min())} to "
                f"{int(codes.max())}"
            )
        return codes.long()


@final
class Latents(Subject):
    """The continuous features of a tokenizer of ours: what its encoder hands to the quantizer.

    Args:
        tokenizer: The tokenizer, a saved one, or the folder of a run.

    Raises:
        UserError: It cannot be read, or is not for proteins.
    """

    codebook = None

    def __init__(self, tokenizer: Tokenizer | str | Path) -> None:
        name, self._tokenizer = _of_proteins(tokenizer)
        self.name = f"{name}-continuous"
        self.identity = f"{self._tokenizer.fingerprint}-continuous"

    def encode(self, backbone: Backbone) -> Float[Tensor, "length dim"]:
        """The latent of each residue, NaN where it lacks N, CA or C."""
        device = self._tokenizer.quantizer.hardness.device
        with evaluating(self._tokenizer):
            latents: Tensor = self._tokenizer.encoder(backbone.coordinates[None].to(device))[0].float().cpu()
        return torch.where(latents.isfinite().all(-1, keepdim=True), latents, torch.nan)


@final
class ThreeDi(Subject):
    """The alphabet of Foldseek (10.1038/s41587-023-01773-0) as biotite has it: 20 states, centroids of 2 dimensions.

    It also sees CB, and places one where a residue has none. A residue without neighbours has the state D.
    """

    codebook: Float[Tensor, "codes dim"]
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

    codebook: Float[Tensor, "codes dim"]
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


def _family_of(tokenizer: Tokenizer) -> str:
    """The same of all tokenizers whose parts are built alike, but for how many codes there are."""
    config = {**tokenizer.config, "metadata": None}
    config["quantizer"] = {key: value for key, value in config["quantizer"].items() if key != "codebook_size"}
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:12]


def _of_proteins(tokenizer: Tokenizer | str | Path) -> tuple[str, Tokenizer]:
    """What tables call a tokenizer, and the tokenizer, which has to be one of proteins."""
    name = tokenizer.fingerprint if isinstance(tokenizer, Tokenizer) else Path(tokenizer).name
    found = opened(tokenizer)
    kind = found.metadata.get("data", {}).get("kind", "unknown")
    if kind != "protein":
        raise UserError(f"{name} is a tokenizer of data of kind {kind!r}; the benchmark is of proteins")
    return name, found


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
