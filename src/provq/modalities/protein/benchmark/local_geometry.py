"""A baseline without training: k-means on what a residue sees around it.

chains --descriptors--> (residues, 30) --standardise, k-means--> 512 centres

A trained tokenizer that does no better says nothing that neighbours do not say by themselves.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import final

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.linalg import vector_norm

from provq.errors import UserError
from provq.files import write_whole
from provq.modalities.protein.benchmark.subjects import Subject
from provq.modalities.protein.reading import read_structure, structure_files
from provq.modalities.protein.structure import Backbone
from provq.ops.frames import Frames, is_present, residue_frames, to_residue
from provq.ops.kmeans import kmeans
from provq.ops.nearest import nearest_code
from provq.training.log import advancing

CODES = 512
SEED = 0
_ALONG = tuple(offset for offset in range(-4, 5) if offset)  # neighbours along the chain
_APART = max(_ALONG) + 1  # how far along the chain a neighbour in space is at least
_NEAREST = 2  # of these
_FARTHEST = 20.0  # angstrom; places beyond it are drawn back to it, lest breaks of the chain outweigh all else


def descriptors(backbone: Float[Tensor, "length 4 3"]) -> Float[Tensor, "length 30"]:
    """What a residue sees in its own frame, in angstrom: unchanged when the chain is moved.

    The places of CA of the four residues before and the four behind it, and of the two nearest ones that are farther
    than that along the chain; its own place, zero, stands for one that is not there. NaN where N, CA or C is missing.
    """
    present = is_present(backbone)
    frames = residue_frames(backbone)
    length = len(backbone)
    places = torch.arange(length)
    # One more residue, at the end, is the one that is never there.
    along = torch.stack([places + offset for offset in _ALONG], 1)
    along = torch.where((along >= 0) & (along < length), along, length)
    distances = torch.cdist(frames.origins, frames.origins)
    is_far_along = (places[:, None] - places).abs() >= _APART
    distances = torch.where(is_far_along & present[:, None] & present, distances, torch.inf)
    distances = torch.nn.functional.pad(distances, (0, _NEAREST), value=torch.inf)
    nearest = distances.topk(_NEAREST, largest=False)
    in_space = torch.where(nearest.values.isfinite(), nearest.indices, length)
    chosen = torch.cat((along, in_space), 1)
    origins = torch.cat((frames.origins, frames.origins.new_zeros(1, 3)))
    is_there = torch.cat((present, present.new_zeros(1)))[chosen]
    seen = to_residue(Frames(frames.rotations, frames.origins), origins[chosen])
    seen = seen * (_FARTHEST / vector_norm(seen, dim=-1, keepdim=True).clamp_min(_FARTHEST))
    seen = torch.where(is_there[..., None], seen, 0.0).flatten(1)
    return torch.where(present[:, None], seen, torch.nan)


@final
class LocalKMeans(Subject):
    """Codes by the nearest of 512 centres of `descriptors`, each of whose numbers is standardised.

    Args:
        structures: The folder of structures whose residues the centres are found on.
        kept: The folder in which what was found is kept, and looked for first; None to keep nothing.

    Raises:
        UserError: There are no structures, one cannot be read, they have fewer residues than there are centres, or what
            was kept is damaged.
    """

    codebook: Float[Tensor, "codes 30"]
    name = "k-means"

    def __init__(self, structures: Path, kept: Path | None = None) -> None:
        files = structure_files(structures)
        place = None if kept is None else kept / f"k-means-{_digest(files)}.safetensors"
        if place is not None and place.is_file():
            fit = _read(place)
        else:
            fit = _fit([path for _, path in files])
            if place is not None:
                write_whole(place, save(fit))
        self._mean, self._deviation, self.codebook = fit["mean"], fit["deviation"], fit["codebook"]
        self.identity = hashlib.sha256(save(fit)).hexdigest()[:12]

    def encode(self, backbone: Backbone) -> Int[Tensor, " length"]:
        """The nearest centre of each residue, -1 where it lacks N, CA or C."""
        seen = (descriptors(backbone.coordinates) - self._mean) / self._deviation
        present = seen.isfinite().all(1)
        codes = torch.full((len(backbone),), -1)
        codes[present] = nearest_code(seen[present], self.codebook)
        return codes


def _digest(files: Sequence[tuple[str, Path]]) -> str:
    """Names what centres are found on: files by name and size, and how."""
    told = (CODES, SEED, _ALONG, _NEAREST, _FARTHEST, [(name, path.stat().st_size) for name, path in files])
    return hashlib.sha256(repr(told).encode()).hexdigest()[:8]


def _read(place: Path) -> dict[str, Tensor]:
    try:
        fit = load_file(place)
    except SafetensorError as error:
        raise UserError(f"{place} is damaged: {error}; remove it, and it is made anew") from error
    if set(fit) != {"mean", "deviation", "codebook"}:
        raise UserError(f"{place} holds something else than centres; remove it, and it is made anew")
    return fit


def _fit(paths: Sequence[Path]) -> dict[str, Tensor]:
    seen = torch.cat(
        [
            descriptors(backbone.coordinates)
            for path in advancing(paths, len(paths), "k-means")
            for backbone in read_structure(path).backbones
        ]
    )
    seen = seen[seen.isfinite().all(1)]
    mean, deviation = seen.mean(0), seen.std(0).clamp_min(1e-3)
    points = (seen - mean) / deviation
    codebook, _ = kmeans(points, torch.ones(len(points), dtype=torch.bool), CODES, seed=SEED)
    return {"mean": mean, "deviation": deviation, "codebook": codebook}
