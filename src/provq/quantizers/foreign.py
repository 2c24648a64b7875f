"""Codebooks that other libraries trained, as quantizers of provq: what a state dict holds tells whose it is.

Read are the states of

* vector-quantize-pytorch: `VectorQuantize`, `ResidualVQ`, `GroupedResidualVQ`, `SimVQ`, `ResidualSimVQ`;
* taming-transformers and LlamaGen: a quantizer with an `embedding.weight`;
* encodec and moshi (Mimi): residual quantizers with moving averages, moshi's split one too.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from provq.errors import UserError
from provq.quantizers.base import Quantizer
from provq.quantizers.grouped import GroupedQuantizer
from provq.quantizers.residual import ResidualQuantizer
from provq.quantizers.simvq import SimVQ
from provq.quantizers.vector import VectorQuantizer

Distance = Literal["euclidean", "cosine"]
Layout = Literal["single", "residual", "groups", "split"]

# What the libraries call the parts of a codebook: in this order the names of vector-quantize-pytorch (then encodec,
# whose flag alone differs), taming-transformers, and moshi with those that it still takes for its own.
_CODES = ("embed", "weight")
_SUMS = ("embed_avg", "embedding_sum", "embed_sum")
_COUNTS = ("cluster_size", "cluster_usage")
_FLAGS = ("initted", "inited", "_initialized")

_EPSILON = 1e-5  # added to counts by vector-quantize-pytorch, encodec and taming, the least count in moshi
_CLOSE = 1e-3  # far above rounding and that epsilon, far below what a few steps of an optimizer move

_LEAF = re.compile(
    r"(?P<place>(?:.*\.)?)(?P<leaf>_codebook\.(?:embed|embed_avg|embedding_sum|embed_sum)"
    r"|frozen_codebook|embedding\.weight)"
)
_PLACE = re.compile(
    r"(?P<prefix>(?:.*?\.)??)(?P<part>rvqs\.\d+\.|rvq_(?:first|rest)\.)?(?P<stage>(?P<inner>(?:vq\.)?)layers\.\d+\.)?"
)


class _Found(NamedTuple):
    layout: Layout
    prefix: str
    inner: str  # what stands between the prefix, or the part, and the stages


class _Table(NamedTuple):
    """One codebook; `counts` where it learns by moving averages."""

    codes: Float[Tensor, "codes dim"]
    counts: Float[Tensor, " codes"] | None


class _Maps(NamedTuple):
    """The linear maps to the length of codes and back."""

    into: Float[Tensor, "code_dim dim"]
    into_bias: Float[Tensor, " code_dim"]
    back: Float[Tensor, "dim code_dim"]
    back_bias: Float[Tensor, " dim"]


def from_state(state: Mapping[str, Tensor], *, heads: int = 1, distance: Distance = "euclidean") -> Quantizer:
    """A quantizer, in evaluation mode, that makes the tokens and values of the module that a state dict is from.

    Channels are last and so is the axis of codebooks, whatever the order was there. The state may be that of a whole
    model with one quantizer in it. Codebooks of moving averages keep their counts and go on learning so. What a state
    does not hold - decay, weights of losses, the estimator - is as a new quantizer has it. Of codes whose distances
    differ by less than float32 sees, such as unused ones that have faded to zero together, either library may take
    another one.

    Args:
        state: The tensors by name; nothing but tensors is read, and nothing is run.
        heads: Parts of a latent that share the one codebook, which a state does not tell.
        distance: "cosine" where codes and latents were normalized, which a state does not always tell.

    Raises:
        UserError: The layout is unknown, stands there several times or does what provq does not, the arguments do not
            fit it, or a tensor is missing, of a wrong shape or not finite.
    """
    found = _find(state)
    if found.layout == "single":
        return _single(state, found.prefix, heads, distance).eval()
    if heads != 1 or distance != "euclidean":
        raise UserError(
            f"from_state: the keys under {found.prefix!r} are those of residual stages, which provq has with heads=1 "
            f"and distance='euclidean', got {heads} and {distance!r}"
        )
    read = {"residual": _residual, "groups": _groups, "split": _split}[found.layout]
    return read(state, found).eval()


def _find(state: Mapping[str, Tensor]) -> _Found:
    """The one place at which the keys are those of a quantizer."""
    found = set()
    for key in state:
        leaf = _LEAF.fullmatch(key)
        if leaf is None:
            continue
        if leaf["leaf"] == "embedding.weight":  # any table of a model is called so; a row of them is no quantizer
            found.add(_Found("single", leaf["place"], ""))
            continue
        place = _PLACE.fullmatch(leaf["place"])
        assert place is not None  # the prefix takes whatever the rest does not
        if place["part"]:
            layout: Layout = "groups" if place["part"].startswith("rvqs") else "split"
        else:
            layout = "residual" if place["stage"] else "single"
        found.add(_Found(layout, place["prefix"], place["inner"] or ""))
    if not found:
        raise UserError(
            "from_state: no quantizer that is known here; looked for keys that end in _codebook.embed, "
            "_codebook.embedding_sum, frozen_codebook with code_transform.weight, or embedding.weight; "
            f"the first of {len(state)} keys: {', '.join(list(state)[:5]) or 'none'}"
        )
    if len(found) > 1:
        places = ", ".join(sorted(repr(one.prefix + one.inner) for one in found))
        raise UserError(
            f"from_state: {len(found)} quantizers, under the prefixes {places}; "
            "give only the keys of one of them, such as {k: v for k, v in state.items() if k.startswith(prefix)}"
        )
    return found.pop()


def _single(state: Mapping[str, Tensor], prefix: str, heads: int, distance: Distance) -> Quantizer:
    if f"{prefix}frozen_codebook" in state:
        if heads != 1 or distance != "euclidean":
            raise UserError(
                f"from_state: {prefix}frozen_codebook is that of a SimVQ, which goes with heads=1 and "
                f"distance='euclidean', got {heads} and {distance!r}"
            )
        return _simvq(state, prefix)
    tables = _tables(state, prefix, distance)
    if len(tables) > 1 and heads not in (1, len(tables)):
        raise UserError(f"from_state: {prefix}_codebook has a table for each of {len(tables)} heads, got heads={heads}")
    maps = _maps(state, f"{prefix}project_in.", f"{prefix}project_out.")
    length = tables[0].codes.shape[1]
    code_dim = length * max(len(tables), heads)
    dim = code_dim if maps is None else maps.into.shape[1]
    if maps is not None and (len(maps.into) != code_dim or dim == code_dim):
        raise UserError(
            f"from_state: {prefix}project_in.weight has shape {tuple(maps.into.shape)}, expected {code_dim} rows for "
            f"codes of length {length} and heads={max(len(tables), heads)}, and more or fewer columns than rows"
        )
    if len(tables) == 1:
        return _projecting(_vector(tables[0], dim, heads, distance), maps)
    groups = tuple(_vector(table, length, 1, distance) for table in tables)
    return _projecting(GroupedQuantizer(groups, dim=dim), maps)


def _residual(state: Mapping[str, Tensor], found: _Found) -> Quantizer:
    maps = _maps_of_residual(state, found.prefix, found.inner)
    widen = _is_square(maps)
    stages, rounds = _stages(state, found.prefix + found.inner, maps, widen)
    dim = None if maps is None else maps.into.shape[1]
    return _projecting(ResidualQuantizer(stages, dim=dim, rounds=rounds), _widened(maps, widen))


def _groups(state: Mapping[str, Tensor], found: _Found) -> Quantizer:
    """Residual quantizers, each of its part of a latent."""
    parts = [f"{found.prefix}rvqs.{number}." for number in range(_number(state, f"{found.prefix}rvqs."))]
    given = [maps for part in parts if (maps := _maps_of_residual(state, part, found.inner)) is not None]
    if not given:
        return GroupedQuantizer(tuple(_residual(state, _Found("residual", part, found.inner)) for part in parts))
    if len(given) < len(parts):
        raise UserError(f"from_state: of the parts under {found.prefix}rvqs some project and some do not")
    # Maps of a part each are blocks of one map; what stands between the blocks is free to learn in training.
    maps = _Maps(
        _blocks([own.into for own in given]),
        torch.cat([own.into_bias for own in given]),
        _blocks([own.back for own in given]),
        torch.cat([own.back_bias for own in given]),
    )
    return _side_by_side(state, [part + found.inner for part in parts], given, maps)


def _split(state: Mapping[str, Tensor], found: _Found) -> Quantizer:
    """Residual quantizers of the same latent, whose values are added."""
    parts = [f"{found.prefix}rvq_first.", f"{found.prefix}rvq_rest."]
    given = [maps for part in parts if (maps := _maps_of_residual(state, part, found.inner)) is not None]
    if len(given) < len(parts) or len({own.into.shape[1] for own in given}) > 1:
        raise UserError(
            f"from_state: {' and '.join(parts)} need an input_proj or output_proj each, for latents of one length; "
            "give the two parts one after the other, and add what they make"
        )
    # O1 q1 + O2 q2 is one map of q1 beside q2, and those are made of W1 z beside W2 z: two groups between two maps.
    maps = _Maps(
        torch.cat([own.into for own in given]),
        torch.cat([own.into_bias for own in given]),
        torch.cat([own.back for own in given], 1),
        torch.stack([own.back_bias for own in given]).sum(0),
    )
    return _side_by_side(state, [part + found.inner for part in parts], given, maps)


def _blocks(matrices: Sequence[Tensor]) -> Float[Tensor, "rows columns"]:
    whole: Tensor = torch.block_diag(*matrices)  # type: ignore[no-untyped-call]  # torch gives it no types
    return whole


def _side_by_side(
    state: Mapping[str, Tensor], places: Sequence[str], of_places: Sequence[_Maps], maps: _Maps
) -> Quantizer:
    groups = []
    for place, own in zip(places, of_places, strict=True):
        stages, rounds = _stages(state, place, own, _is_square(maps) if place == places[-1] else 0)
        groups.append(ResidualQuantizer(stages, rounds=rounds))
    return _projecting(GroupedQuantizer(tuple(groups), dim=maps.into.shape[1]), _widened(maps, _is_square(maps)))


def _stages(
    state: Mapping[str, Tensor], prefix: str, maps: _Maps | None, widen: int
) -> tuple[tuple[Quantizer, ...], int]:
    """The stages, and how often they are gone through: several times where all have the one codebook."""
    if any(key.startswith(f"{prefix}mlps.") for key in state):
        raise UserError(f"from_state: {prefix}mlps makes a codebook out of codes (QINCo), which provq does not do")
    places = [f"{prefix}layers.{number}." for number in range(_number(state, f"{prefix}layers."))]
    stages = tuple(_stage(state, place, widen) for place in places)
    length = stages[0].dim - widen if maps is None else len(maps.into)
    for place, stage in zip(places, stages, strict=True):
        if stage.dim - widen != length:
            raise UserError(f"from_state: {place} has codes of length {stage.dim - widen}, expected {length}")
    # A shared codebook is saved once a stage; two that were trained apart are never the same to the last digit.
    if len(places) > 1 and all(_are_equal(state, places[0], place) for place in places[1:]):
        return stages[:1], len(places)
    return stages, 1


def _stage(state: Mapping[str, Tensor], place: str, widen: int) -> Quantizer:
    if _names(state, f"{place}project_in.") or _names(state, f"{place}project_out."):
        raise UserError(f"from_state: {place} projects by itself, which a stage of provq does not")
    if f"{place}frozen_codebook" in state:
        return _simvq(state, place)
    tables = _tables(state, place, "euclidean")
    if len(tables) > 1:
        raise UserError(f"from_state: {place}_codebook has {len(tables)} heads, a stage has one")
    codes, counts = tables[0]
    codes = pad(codes, (0, widen))
    return _vector(_Table(codes, counts), codes.shape[1], 1, "euclidean")


def _simvq(state: Mapping[str, Tensor], prefix: str) -> SimVQ:
    names = _names(state, f"{prefix}code_transform.")
    if names != ["weight"]:
        raise UserError(
            f"from_state: {prefix}code_transform must be one linear map without bias, with the key weight alone; "
            f"got {', '.join(names) or 'none'}, and what stands between layers is not in a state"
        )
    base = _tensor(state, f"{prefix}frozen_codebook", None, None)
    weight = _tensor(state, f"{prefix}code_transform.weight", None, base.shape[1])
    length, missing = len(weight), len(weight) - base.shape[1]
    if missing < 0:
        raise UserError(
            f"from_state: {prefix}frozen_codebook has shape {tuple(base.shape)}, longer vectors than the codes of "
            f"length {length} that {prefix}code_transform makes of them; provq's SimVQ has no such map"
        )
    made = SimVQ(length, len(base)).to(base.device)
    with torch.no_grad():
        made.base.copy_(pad(base, (0, missing)))
        # What is multiplied by these zeros is zero and passes them no gradient.
        next(made.learned.parameters()).copy_(pad(weight, (0, missing)))
    return made


def _vector(table: _Table, dim: int, heads: int, distance: Distance) -> VectorQuantizer:
    codes, counts = table
    update: Literal["gradient", "ema"] = "gradient" if counts is None else "ema"
    size, length = codes.shape
    made = VectorQuantizer(
        dim, size, codebook_dim=length, heads=heads, distance=distance, update=update, init="normal"
    ).to(codes.device)
    made.load_codebook(codes)
    if counts is not None:
        made.ema_counts.copy_(counts)
    return made


def _tables(state: Mapping[str, Tensor], prefix: str, distance: Distance) -> list[_Table]:
    """The codebooks of a quantizer: one, or one a head."""
    place = f"{prefix}_codebook."
    names = _names(state, place)
    if not names:
        place = f"{prefix}embedding."
        names = _names(state, place)
        if f"{prefix}used" in state:
            raise UserError(f"from_state: {prefix}used numbers the codes anew (remap), which provq does not do")
    unknown = [name for name in names if name not in (*_CODES, *_SUMS, *_COUNTS, *_FLAGS)]
    if unknown:
        raise UserError(f"from_state: {place}{unknown[0]} changes what codes are, in a way that provq does not know")
    codes_key, sums_key, counts_key, flag_key = (
        next((place + name for name in known if name in names), None) for known in (_CODES, _SUMS, _COUNTS, _FLAGS)
    )
    if flag_key is not None and not _tensor(state, flag_key).all():
        raise UserError(f"from_state: {flag_key} is false: the codebook still waits for its first data, and has none")
    if codes_key is None:
        return _of_sums(state, place, sums_key, counts_key, distance)
    codes = _tensor(state, codes_key)
    if codes.ndim not in (2, 3) or not codes.numel():
        raise UserError(f"from_state: {codes_key}: expected (heads,) codes, dim, got shape {tuple(codes.shape)}")
    if sums_key is None or counts_key is None:
        return [_Table(own, None) for own in codes.reshape(-1, *codes.shape[-2:])]
    counts = _smoothed(_tensor(state, counts_key, *codes.shape[:-1]))
    sums = _tensor(state, sums_key, *codes.shape)
    lengths, norms = codes.norm(dim=-1), sums.norm(dim=-1)
    are_means = _are_close(codes * counts[..., None], sums)
    are_directions = _are_close(codes * norms[..., None], sums)
    off_sphere = (lengths - 1).abs() > _CLOSE
    if distance == "euclidean" and are_directions and not are_means and not off_sphere.any():
        raise UserError(
            f"from_state: {codes_key} holds directions of means, not means; give distance='cosine', which goes for one "
            "quantizer alone, not for residual stages"
        )
    if distance == "cosine" and off_sphere.any():
        raise UserError(
            f"from_state: {codes_key} has {int(off_sphere.sum())} codes of other lengths than 1, such as "
            f"{lengths[off_sphere][0]:.3g}; give distance='euclidean', or, where codes that were not used have faded "
            "to zero, let their library replace them first"
        )
    learns_by_means = are_directions if distance == "cosine" else are_means
    if distance == "cosine" and learns_by_means:
        codes = codes * (norms / counts)[..., None]
    size, length = codes.shape[-2:]
    return [
        _Table(own, own_counts if learns_by_means else None)
        for own, own_counts in zip(codes.reshape(-1, size, length), counts.reshape(-1, size), strict=True)
    ]


def _of_sums(
    state: Mapping[str, Tensor], place: str, sums_key: str | None, counts_key: str | None, distance: Distance
) -> list[_Table]:
    if sums_key is None or counts_key is None:
        raise UserError(f"from_state: {place}embed is missing, and so are sums or counts from which it could be made")
    if distance != "euclidean":
        raise UserError(f"from_state: {sums_key} is that of a codebook with distance='euclidean', got {distance!r}")
    sums = _tensor(state, sums_key, None, None)
    counts = _tensor(state, counts_key, len(sums)).clamp_min(_EPSILON)
    return [_Table(sums / counts[:, None], counts)]


def _smoothed(counts: Float[Tensor, "*heads codes"]) -> Float[Tensor, "*heads codes"]:
    """The counts by which sums were divided: with Laplace's correction, at the same total."""
    total = counts.sum(-1, keepdim=True)
    return (counts + _EPSILON) / (total + counts.shape[-1] * _EPSILON) * total


def _are_close(one: Float[Tensor, "*shape"], other: Float[Tensor, "*shape"]) -> bool:
    return torch.allclose(one, other, rtol=_CLOSE, atol=_CLOSE * float(other.abs().mean()))


def _maps_of_residual(state: Mapping[str, Tensor], prefix: str, inner: str) -> _Maps | None:
    codebook = _names(state, f"{prefix}{inner}layers.0._codebook.")
    # Convolutions around the stages are moshi's, which alone keeps sums without codes; elsewhere they are the model's.
    if inner and codebook and not set(codebook) & set(_CODES):
        return _maps(state, f"{prefix}input_proj.", f"{prefix}output_proj.")
    return _maps(state, f"{prefix}{inner}project_in.", f"{prefix}{inner}project_out.")


def _maps(state: Mapping[str, Tensor], into_place: str, back_place: str) -> _Maps | None:
    """Two linear maps, of which one may be left out; None where both are."""
    into, back = _linear(state, into_place), _linear(state, back_place)
    given = into or back
    if given is None:
        return None
    weight, _ = given
    code_dim = len(weight) if back is None else back[0].shape[1]
    same = torch.eye(code_dim, device=weight.device), weight.new_zeros(code_dim)
    maps = _Maps(*(into or same), *(back or same))
    if maps.back.shape != maps.into.T.shape:
        raise UserError(
            f"from_state: {into_place}weight and {back_place}weight must lead to the length of codes and back, "
            f"got shapes {tuple(maps.into.shape)} and {tuple(maps.back.shape)}"
        )
    return maps


def _linear(state: Mapping[str, Tensor], place: str) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of a linear layer, or of a convolution of width one."""
    names = _names(state, place)
    if not names:
        return None
    if not {"weight"} <= set(names) <= {"weight", "bias"}:
        raise UserError(f"from_state: {place[:-1]} must be one linear map with weight and bias, got {', '.join(names)}")
    weight = _tensor(state, f"{place}weight")
    if weight.ndim < 2 or not weight.numel() == weight.shape[0] * weight.shape[1] > 0:
        raise UserError(f"from_state: {place}weight: expected shape (out, in) or (out, in, 1), got {(*weight.shape,)}")
    weight = weight.flatten(1)
    bias = _tensor(state, f"{place}bias", len(weight)) if "bias" in names else weight.new_zeros(len(weight))
    return weight, bias


def _is_square(maps: _Maps | None) -> int:
    """1 where a projection leads to the same length, else 0.

    Quantizers of provq project where codes have another length. There codes get one more coordinate, which is zero and
    to which zeros lead: it changes no distance and no value, and no gradient reaches it.
    """
    return int(maps is not None and len(maps.into) == maps.into.shape[1])


def _widened(maps: _Maps | None, by: int) -> _Maps | None:
    if maps is None:
        return None
    return _Maps(pad(maps.into, (0, 0, 0, by)), pad(maps.into_bias, (0, by)), pad(maps.back, (0, by)), maps.back_bias)


def _projecting(made: Quantizer, maps: _Maps | None) -> Quantizer:
    if maps is None:
        return made
    assert made.project_in is not None and made.project_out is not None  # lengths were seen to differ
    made.to(maps.into.device)
    with torch.no_grad():
        made.project_in.weight.copy_(maps.into)
        made.project_in.bias.copy_(maps.into_bias)
        made.project_out.weight.copy_(maps.back)
        made.project_out.bias.copy_(maps.back_bias)
    return made


def _names(state: Mapping[str, Tensor], place: str) -> list[str]:
    return [key.removeprefix(place) for key in state if key.startswith(place)]


def _number(state: Mapping[str, Tensor], place: str) -> int:
    """How many modules stand in a row under a place."""
    found = {name.partition(".")[0] for name in _names(state, place)}
    if not found or found != {str(number) for number in range(len(found))}:
        raise UserError(f"from_state: {place} must be numbered from 0 without a gap, got {', '.join(sorted(found))}")
    return len(found)


def _are_equal(state: Mapping[str, Tensor], one: str, other: str) -> bool:
    names = _names(state, one)
    return sorted(names) == sorted(_names(state, other)) and all(
        torch.equal(state[one + name], state[other + name]) for name in names
    )


def _tensor(state: Mapping[str, Tensor], key: str, *sizes: int | None) -> Tensor:
    """A tensor in float32; sizes, where they are given, are those of its axes, None for any but 0."""
    found = state.get(key)
    if not isinstance(found, Tensor):
        raise UserError(f"from_state: {key} must be a tensor, got {type(found).__name__}")
    if sizes and (
        found.ndim != len(sizes)
        or any(
            size != wanted if wanted is not None else not size for size, wanted in zip(found.shape, sizes, strict=True)
        )
    ):
        expected = ", ".join("any" if size is None else str(size) for size in sizes)
        raise UserError(f"from_state: {key}: expected shape ({expected}), got {tuple(found.shape)}")
    if not found.isfinite().all():
        raise UserError(f"from_state: {key} holds values that are not finite")
    return found.detach().float()
