"""How far a backbone is from another one, whatever way the two lie in space, as sums that training can make small.

Residues are compared pairwise: some, the `rows`, with all. What either of a pair lacks (NaN) does not count. Distances
and directions are those of ESM3 (10.1126/science.ads0018), but masked residue by residue; the frame-aligned error is
that of AlphaFold 2. The error after superposition compares each residue with itself alone, and clamps nothing.

The last three errors are of what heads of a decoder say beside a backbone: of bins, for pairs of rows with all other
residues (those of ESM3 too), and of amino acids.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from provq.modalities.protein.structure import CA, C, N, chain_breaks
from provq.modalities.protein.superposition import backbone_squares
from provq.ops.frames import is_present, of_neighbours, residue_frames, to_residue, virtual_cb

_ATOMS = 3  # N, CA and C
_LARGEST_SQUARE = 25.0  # square angstrom; errors of 5 angstrom and more count alike
_LARGEST_PRODUCT = 20.0
_LARGEST_DISTANCE = 10.0  # angstrom
_FIRST_EDGE, _BIN = 2.3125, 0.3075  # angstrom; where the first bin of distances ends, and how wide those behind it are


def distance_error(
    output: Float[Tensor, "b length 4 3"],
    target: Float[Tensor, "b length 4 3"],
    rows: Int[Tensor, "b rows"],
    counts: Bool[Tensor, "b rows"],
) -> Float[Tensor, ""]:
    """The mean squared error of distances between N, CA and C, in square angstrom, each at most 25.

    Args:
        output: The backbones that are to become like the others.
        target: Those that they are to become like.
        rows: The residues that are compared with all.
        counts: Which of these there are.
    """
    present = is_present(target)
    own, others = (_distances(_atoms(backbone, present), rows) for backbone in (output, target))
    pairs = _pairs(counts, present, _ATOMS) & (others > 0)  # an atom has no distance from itself
    return _mean((own - others).square().clamp_max(_LARGEST_SQUARE), pairs)


def direction_error(
    output: Float[Tensor, "b length 4 3"],
    target: Float[Tensor, "b length 4 3"],
    rows: Int[Tensor, "b rows"],
    counts: Bool[Tensor, "b rows"],
) -> Float[Tensor, ""]:
    """The mean squared error of the inner products of bonds and normals, each at most 20.

    Of a residue these are N to CA, CA to C, C to the next N, and the normals -(N CA x CA C), (C before, N x N CA) and
    (CA C x C N behind); those at the end of a chain, or at a break of it, have none. The arguments are those of
    `distance_error`.
    """
    present = is_present(target)
    linked = _between_bonded(target, present)
    own, others = (_directions(_atoms(backbone, present)) for backbone in (output, target))
    products = [
        torch.einsum("brkd,blmd->brklm", of_neighbours(vectors, rows[..., None])[:, :, 0], vectors)
        for vectors in (own, others)
    ]
    error = (products[0] - products[1]).square().clamp_max(_LARGEST_PRODUCT)
    pairs = (counts & linked.gather(1, rows))[:, :, None] & linked[:, None]
    return _mean(error, pairs[:, :, None, :, None].expand_as(error))


def aligned_error(
    output: Float[Tensor, "b length 4 3"],
    target: Float[Tensor, "b length 4 3"],
    rows: Int[Tensor, "b rows"],
    counts: Bool[Tensor, "b rows"],
) -> Float[Tensor, ""]:
    """The mean distance of N, CA and C as the rows' residues see them, each at most 10 angstrom, in units of 10.

    The frame-aligned point error of AlphaFold 2 (10.1038/s41586-021-03819-2, supplement, algorithm 28); unlike
    distances it tells a chain from its mirror image. The arguments are those of `distance_error`.
    """
    present = is_present(target)
    seen = [_seen_from(backbone, present, rows) for backbone in (output, target)]
    # The root has no slope at 0.
    distance = ((seen[0] - seen[1]).square().sum(-1) + 1e-4).sqrt().clamp_max(_LARGEST_DISTANCE)
    pairs = (counts[:, :, None] & present[:, None]).repeat_interleave(_ATOMS, -1)
    return _mean(distance, pairs) / _LARGEST_DISTANCE


def superposed_error(output: Float[Tensor, "b length 4 3"], target: Float[Tensor, "b length 4 3"]) -> Float[Tensor, ""]:
    """The mean squared distance of N, CA and C after superposition, in square angstrom; far ones count in full.

    Args:
        output: The backbones that are to become like the others.
        target: Those that they are to become like.
    """
    squares = backbone_squares(output, target)
    present = ~squares.isnan()
    return (squares.where(present, 0.0).sum() / present.sum().clamp_min(1)).float()


def binned_distance_error(
    logits: Float[Tensor, "b rows length bins"],
    target: Float[Tensor, "b length 4 3"],
    rows: Int[Tensor, "b rows"],
    counts: Bool[Tensor, "b rows"],
) -> Float[Tensor, ""]:
    """The mean cross-entropy of the bins of distances from (virtual) CB to CB, of 2.3125 + 0.3075 i angstrom.

    Shorter distances are in the first bin, longer ones in the last.

    Args:
        logits: Of bins, for pairs of the rows with all residues.
        target: The backbones that are right.
        rows: The residues that are paired with all others.
        counts: Which of these there are.
    """
    present = is_present(target)
    distances = _distances(virtual_cb(_atoms(target, present))[:, :, None], rows)
    bins = _binned(distances, _FIRST_EDGE, _BIN, logits.shape[-1])
    return _mean(_surprise(logits, bins), _pairs_of_two(rows, counts, present))


def binned_direction_error(
    logits: Float[Tensor, "b rows length 6 bins"],
    target: Float[Tensor, "b length 4 3"],
    rows: Int[Tensor, "b rows"],
    counts: Bool[Tensor, "b rows"],
) -> Float[Tensor, ""]:
    """The mean cross-entropy of the bins, even ones of [-1, 1], of how two residues are turned to one another.

    Of a residue these are the unit vectors u from CA to C, v from CA to N, and w along u x v; of two the inner products
    u v', u w', v u', v w', w u' and w v'. The arguments are those of `binned_distance_error`.
    """
    present = is_present(target)
    n, ca, c = _atoms(target, present).unbind(-2)
    u, v = normalize(c - ca, dim=-1), normalize(n - ca, dim=-1)
    axes = torch.stack((u, v, normalize(torch.linalg.cross(u, v), dim=-1)), dim=-2)
    products = torch.einsum("brkd,blmd->brlkm", of_neighbours(axes, rows[..., None])[:, :, 0], axes)
    products = products[..., ~torch.eye(3, dtype=torch.bool, device=products.device)]
    width = 2 / logits.shape[-1]
    errors = _surprise(logits, _binned(products, width - 1, width, logits.shape[-1]))
    return _mean(errors, _pairs_of_two(rows, counts, present)[..., None].expand_as(errors))


def residue_error(
    logits: Float[Tensor, "b length kinds"], target: Float[Tensor, "b length 4 3"], kinds: Int[Tensor, "b length"]
) -> Float[Tensor, ""]:
    """The mean cross-entropy of what residues are, over those of the target that are known.

    Args:
        logits: Of amino acids.
        target: The backbones to which they belong.
        kinds: Which amino acids are right, -1 where nobody knows.
    """
    return _mean(_surprise(logits, kinds.clamp_min(0)), is_present(target) & (kinds >= 0))


def _atoms(backbone: Float[Tensor, "b length 4 3"], present: Bool[Tensor, "b length"]) -> Float[Tensor, "b length 3 3"]:
    """N, CA and C, and zeros where there is no residue: what is not a number would be one in no gradient."""
    return torch.where(present[..., None, None], backbone[:, :, :_ATOMS], 0.0)


def _distances(
    atoms: Float[Tensor, "b length atoms 3"], rows: Int[Tensor, "b rows"]
) -> Float[Tensor, "b atoms_of_rows atoms_of_all"]:
    chosen = of_neighbours(atoms, rows[..., None])[:, :, 0]
    return torch.cdist(chosen.flatten(1, 2), atoms.flatten(1, 2), compute_mode="donot_use_mm_for_euclid_dist")


def _pairs(
    counts: Bool[Tensor, "b rows"], present: Bool[Tensor, "b length"], atoms: int
) -> Bool[Tensor, "b atoms_of_rows atoms_of_all"]:
    return counts.repeat_interleave(atoms, -1)[:, :, None] & present.repeat_interleave(atoms, -1)[:, None]


def _pairs_of_two(
    rows: Int[Tensor, "b rows"], counts: Bool[Tensor, "b rows"], present: Bool[Tensor, "b length"]
) -> Bool[Tensor, "b rows length"]:
    everyone = torch.arange(present.shape[1], device=rows.device)
    return _pairs(counts, present, 1) & (rows[..., None] != everyone)


def _binned(values: Float[Tensor, "*batch"], first_edge: float, width: float, number: int) -> Int[Tensor, "*batch"]:
    return ((values - first_edge) / width + 1).floor().clamp(0, number - 1).long()


def _surprise(logits: Float[Tensor, "*batch bins"], bins: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    return logits.logsumexp(-1) - logits.gather(-1, bins[..., None])[..., 0]


def _between_bonded(
    target: Float[Tensor, "b length 4 3"], present: Bool[Tensor, "b length"]
) -> Bool[Tensor, "b length"]:
    """Residues that are bonded to one on either side, both of which are present."""
    bonded = ~chain_breaks(target) & present[:, 1:] & present[:, :-1]
    ends = torch.zeros_like(present[:, :1])
    return torch.cat([ends, bonded], 1) & torch.cat([bonded, ends], 1)


def _directions(atoms: Float[Tensor, "b length 3 3"]) -> Float[Tensor, "b length 6 3"]:
    n, ca, c = atoms[:, :, N], atoms[:, :, CA], atoms[:, :, C]
    to_ca, to_c = ca - n, c - ca
    to_next = n.roll(-1, 1) - c
    from_before = n - c.roll(1, 1)
    normals = [torch.linalg.cross(a, b) for a, b in ((to_c, to_ca), (from_before, to_ca), (to_c, to_next))]
    return torch.stack([to_ca, to_c, to_next, *normals], 2)


def _seen_from(
    backbone: Float[Tensor, "b length 4 3"], present: Bool[Tensor, "b length"], rows: Int[Tensor, "b rows"]
) -> Float[Tensor, "b rows atoms_of_all 3"]:
    frames = residue_frames(torch.where(present[..., None, None], backbone, 0.0))
    chosen = type(frames)(*(of_neighbours(part, rows[..., None])[:, :, 0] for part in frames))
    return to_residue(chosen, _atoms(backbone, present).flatten(1, 2)[:, None])


def _mean(errors: Float[Tensor, "..."], pairs: Bool[Tensor, "..."]) -> Float[Tensor, ""]:
    return torch.where(pairs, errors, 0.0).sum() / pairs.sum().clamp_min(1)
