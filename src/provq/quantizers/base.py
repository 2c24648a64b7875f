"""The contract of every quantizer, and the one forward pass that all of them share.

A quantizer knows codebooks and blends; it knows no step. `hardness` says how much of what the decoder reads is
the code: 0 is a continuous autoencoder, 1 are discrete tokens. Only training mode reads it; evaluation is hard.

    z --enter--> u --choose--> indices --codes--> q --estimate--> q with a gradient --+
                 |                                                                    blend --leave--> quantized
                 +--------------------------------------------------------------------+

`enter` projects and relaxes, `leave` projects back; where codes are as long as latents neither projects.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, TypeVar, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

from provq.errors import CodeIndexError, UserError
from provq.ops.blend import TokensHarden, blended
from provq.ops.collectives import sum_over_ranks
from provq.ops.masking import is_seen, where_kept

ModuleType = TypeVar("ModuleType", bound=nn.Module)
QuantizerType = TypeVar("QuantizerType", bound="Quantizer")


class Quantized(NamedTuple):
    """What a quantizer returns.

    `indices` are int64, -1 where there is no token (masked or not finite); quantizers with several codebooks
    add one last axis. `loss` is the sum of the quantizer's own terms, already weighted.
    """

    quantized: Float[Tensor, "*batch dim"]
    indices: Int[Tensor, "..."]
    loss: Float[Tensor, ""]


class Nearest(NamedTuple):
    """Latents as they are compared with codes, their nearest codes, and the indices of these; NaN and -1 for none."""

    latents: Float[Tensor, "*batch code_dim"]
    codes: Float[Tensor, "*batch code_dim"]
    indices: Int[Tensor, "..."]


class Quantizer(nn.Module, ABC):
    """A map from vectors to codes and back; channels are last and any axes may lead.

    Attributes:
        dim: Length of the vectors that come in and go out.
        code_dim: Length of the vectors that are compared with codes; where it is not `dim`, learned linear maps lead
            there and back.
        codebook_sizes: Number of codes, one entry a codebook; empty where nothing is quantized.
        hardness: 0-dim float32 buffer in [0, 1], 1 at construction; it is not part of the saved state.
        tokens_harden: How hardness is spread over tokens (see `ops.blend`); told from outside, as hardness is.
    """

    hardness: Tensor
    tokens_harden: TokensHarden = "together"

    def __init__(self, dim: int, codebook_sizes: tuple[int, ...], *, code_dim: int | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.code_dim = dim if code_dim is None else code_dim
        self.codebook_sizes = codebook_sizes
        projects = self.code_dim != dim
        self.project_in = nn.Linear(dim, self.code_dim) if projects else None
        self.project_out = nn.Linear(self.code_dim, dim) if projects else None
        self.register_buffer("hardness", torch.ones(()), persistent=False)

    @abstractmethod
    def relax(self, z: Float[Tensor, "*batch code_dim"]) -> Float[Tensor, "*batch code_dim"]:
        """The continuous image of `z` that is compared with codes: the identity, the unit sphere, a box."""

    @abstractmethod
    def assign(self, u: Float[Tensor, "*batch code_dim"]) -> Int[Tensor, "..."]:
        """The index of the nearest code of each vector; no gradient passes."""

    @abstractmethod
    def codes(self, indices: Int[Tensor, "..."]) -> Float[Tensor, "*batch code_dim"]:
        """The codes at indices that are known to be in range; -1 stands for zeros."""

    def has_token(self, indices: Int[Tensor, "..."]) -> Bool[Tensor, "*batch"]:
        """Hook: where there is something to decode; where any index is not -1, by default."""
        present = indices != -1
        return present if len(self.codebook_sizes) == 1 else present.any(-1)

    @final
    def prefix(self, indices: Int[Tensor, "b ..."]) -> Int[Tensor, " b"]:
        """How many codebooks each item, along the first axis, has a token of; 1 where it has none at all."""
        of_codebooks = indices[..., None] if len(self.codebook_sizes) == 1 else indices
        # The axis of length 1 is for items of a single vector, between whose axes there is nothing to look through.
        present = (of_codebooks != -1)[:, None].flatten(1, -2).any(1)
        return present.sum(-1).clamp(min=1)

    @abstractmethod
    def estimate(
        self, u: Float[Tensor, "*batch code_dim"], q: Float[Tensor, "*batch code_dim"]
    ) -> Float[Tensor, "*batch code_dim"]:
        """Exactly `q`, with the gradient to `u` that the quantizer trains by."""

    @abstractmethod
    def penalty(
        self,
        u: Float[Tensor, "*batch code_dim"],
        q: Float[Tensor, "*batch code_dim"],
        indices: Int[Tensor, "..."],
        keep: Bool[Tensor, "*batch"],
    ) -> Float[Tensor, ""]:
        """The sum of the quantizer's own loss terms, weighted; means over kept tokens and over dims."""

    def choose(self, u: Float[Tensor, "*batch code_dim"], keep: Bool[Tensor, "*batch"]) -> Int[Tensor, "..."]:
        """Hook: the indices that the forward pass takes, which in training may be drawn; the nearest by default."""
        return self.assign(u)

    def blend(
        self, u: Float[Tensor, "*batch code_dim"], values: Float[Tensor, "*batch code_dim"]
    ) -> Float[Tensor, "*batch code_dim"]:
        """Hook: what the decoder reads in training, between `u` and the codes, as `tokens_harden` has it."""
        if is_seen(self.hardness == 1):
            return values
        # A copy, for the buffer may be written before the backward pass that needs its value.
        return blended(u, values, self.hardness.clone(), self.tokens_harden)

    @property
    def members(self) -> tuple["Quantizer", ...]:
        """Hook: the quantizers that this one is made of, which it tells all that it is told; none by default."""
        return ()

    def pass_on_hardness(self) -> None:
        """Hook: give members their hardness, before each training pass; one's own by default."""
        for member in self.members:
            member.hardness.copy_(self.hardness)
            member.pass_on_hardness()

    @property
    def residual_scale(self) -> Float[Tensor, " code_dim"] | float | None:
        """Hook: the size of what is left of `u` once a code is taken off, by which a next stage is made smaller.

        1 where codes find their own scale, the default; None where codes do not add up.
        """
        return 1.0

    def begin(self, u: Float[Tensor, "*batch code_dim"], keep: Bool[Tensor, "*batch"]) -> None:
        """Hook: a start that needs data, before the first assignment in training. Nothing by default."""

    def adapt(
        self, u: Float[Tensor, "*batch code_dim"], indices: Int[Tensor, "..."], keep: Bool[Tensor, "*batch"]
    ) -> None:
        """Hook: what a codebook learns from a training batch other than by gradient. Nothing by default."""

    def evidence(
        self, u: Float[Tensor, "*batch code_dim"], keep: Bool[Tensor, "*batch"]
    ) -> Float[Tensor, "n code_dim"]:
        """Hook: the vectors of a batch that `found` is to be given; the kept ones by default."""
        return u[keep]

    def settle(self, latents: Float[Tensor, "n code_dim"]) -> None:
        """Hook: settle the codebook anew on vectors of this rank that `found` has seen to. Nothing by default."""

    def codes_of_evidence(self, latents: Float[Tensor, "n code_dim"]) -> Float[Tensor, "n code_dim"]:
        """Hook: the nearest codes of vectors as `evidence` gives them; of latents by default."""
        return self.codes(self.assign(latents))

    @property
    def codes_to_found(self) -> int:
        """Hook: the fewest vectors that `found` can settle on; a hand-over passes over a quantizer where it is 0."""
        return max((member.codes_to_found for member in self.members), default=0)

    def rest(self, resting: bool) -> None:
        """Hook: learn nothing as long as `resting`, since a hand-over lies ahead. Told to the members by default."""
        for member in self.members:
            member.rest(resting)

    def found_on_next_batch(self) -> None:
        """Hook: do what `found` does, with the latents of the next training batch. Told to the members by default."""
        for member in self.members:
            member.found_on_next_batch()

    @property
    def awaits_latents(self) -> bool:
        """Hook: whether the codebook is to be settled on the next latents. Where a member's is, by default."""
        return any(member.awaits_latents for member in self.members)

    def steady(self) -> None:
        """Hook: rewrite no code at random from now on, the run is about to end. Told to the members by default."""
        for member in self.members:
            member.steady()

    def baked(self) -> "Quantizer":
        """Hook: an equal quantizer for inference, whose codebook is a plain table; itself by default."""
        return self

    @final  # type: ignore[misc]  # torch declares forward as an attribute
    def forward(self, z: Float[Tensor, "*batch dim"], mask: Bool[Tensor, "..."] | None = None) -> Quantized:
        """Quantize vectors: in training blended by hardness, in evaluation hard.

        A vector with a NaN or an infinity has index -1, enters neither loss nor codebook, and comes out as it
        went in, so that the fault stays in sight.

        Args:
            z: The vectors.
            mask: True where there is a token; elsewhere the output is zero, the index -1, and nothing is learnt.

        Raises:
            UserError: The last axis is not `dim`, or the mask has not the shape of the leading axes.
        """
        self._check(z, mask)
        with torch.autocast(z.device.type, enabled=False):
            # In float32, which is what is quantized. The largest value is not finite where any is not: several times
            # faster than isfinite().all().
            finite = z.detach().float().abs().amax(-1).isfinite()
            keep = finite if mask is None else finite & mask
            u = self.enter(where_kept(finite, z, 0.0))
            if self.training:
                self.pass_on_hardness()
                self.begin(u.detach(), keep)
            indices = self.choose(u.detach(), keep)
            q = self.codes(indices) if self.codebook_sizes else u
            loss = self.penalty(u, q, indices, keep)
            values = self.estimate(u, q)
            if self.training:
                values = self.blend(u, values)
                self.adapt(u.detach(), indices, keep)
            values = self.leave(values)
        absent = z.detach() if mask is None else where_kept(mask, z.detach(), 0.0)
        values = where_kept(keep, values.to(z.dtype), absent)
        return Quantized(values, torch.where(_leading(keep, indices), indices, -1), loss)

    @final
    def nearest(self, z: Float[Tensor, "*batch dim"]) -> Nearest:
        """The nearest codes of latents, whatever hardness is; what is not finite has none, and stays NaN.

        Raises:
            UserError: The last axis is not `dim`.
        """
        self._check(z, None)
        keep = z.abs().amax(-1).isfinite()
        u = self.enter(where_kept(keep, z, 0.0))
        indices = self.assign(u)
        q = self.codes(indices) if self.codebook_sizes else u
        indices = torch.where(_leading(keep, indices), indices, -1)
        return Nearest(where_kept(keep, u, math.nan), where_kept(keep, q, math.nan), indices)

    @final
    def found(self, latents: Float[Tensor, "..."]) -> None:
        """Settle the codebooks anew on vectors of this rank, as `evidence` gives them, and forget the old ones.

        All ranks must call it together. It does nothing where there is no codebook to settle.

        Raises:
            UserError: The vectors have another length than codes, one of them is not finite, or there are fewer over
                all ranks than codes; nothing has changed then.
        """
        if latents.ndim != 2 or latents.shape[1] != self.code_dim or not latents.is_floating_point():
            raise UserError(
                f"{type(self).__name__}: latents must be floating-point and of shape (n, {self.code_dim}), "
                f"got {latents.dtype} of shape {tuple(latents.shape)}"
            )
        latents = latents.float()
        # Added up before anyone stops, so that all ranks stop together.
        wrong = sum_over_ranks((~latents.isfinite()).sum())
        number = sum_over_ranks(torch.tensor(len(latents), device=latents.device))
        if wrong:
            raise UserError(f"{type(self).__name__}: latents must be finite, {int(wrong)} values are not")
        if self.codes_to_found:
            if not number:
                raise UserError(f"{type(self).__name__}: found needs latents, and got none on any rank")
            if self.members:  # before the first of them settles; k-means itself looks for one alone
                check_enough(self, int(number))
            self.settle(latents)

    @final
    def enter(self, z: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch code_dim"]:
        """Vectors as codes are compared with them: in float32, projected where codes have another length, relaxed."""
        with torch.autocast(z.device.type, enabled=False):
            return self.relax(_projected(z.float(), self.project_in))

    @final
    def leave(self, values: Float[Tensor, "*batch code_dim"]) -> Float[Tensor, "*batch dim"]:
        """What the decoder reads: the values themselves, projected back where codes have another length."""
        with torch.autocast(values.device.type, enabled=False):
            return _projected(values, self.project_out)

    @final
    def lookup(self, indices: Int[Tensor, "..."]) -> Float[Tensor, "*batch dim"]:
        """The values that indices stand for, all that decoding needs; -1 stands for zeros.

        Raises:
            CodeIndexError: An index is neither -1 nor that of a code. (An IndexError and a ValueError.)
        """
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            raise UserError(f"{type(self).__name__}: indices must be whole numbers, got {indices.dtype}")
        indices = indices.long()
        sizes = torch.tensor(self.codebook_sizes or (0,), device=indices.device)
        several = len(self.codebook_sizes) != 1
        if several and (indices.ndim == 0 or indices.shape[-1] != len(self.codebook_sizes)):
            raise UserError(
                f"{type(self).__name__}: the last axis of indices must have one entry a codebook, "
                f"{len(self.codebook_sizes)}, got shape {tuple(indices.shape)}"
            )
        # A compiled graph cannot stop to look.
        if not torch.compiler.is_compiling():
            wrong = indices[(indices < -1) | (indices >= (sizes if several else sizes[0]))]
            if wrong.numel():
                raise CodeIndexError(
                    f"{type(self).__name__}: indices must be those of {self.codebook_sizes} codes, "
                    f"or -1 where there is none, got {int(wrong[0])}"
                )
        values = self.leave(self.codes(indices))
        return where_kept(self.has_token(indices), values, 0.0)

    @final
    def codebook_parameters(self) -> list[nn.Parameter]:
        """The parameters that codes are made of: all but the projections."""
        projections = {
            id(parameter)
            for part in self.modules()
            if isinstance(part, Quantizer)
            for projection in (part.project_in, part.project_out)
            if projection is not None
            for parameter in projection.parameters()
        }
        return [parameter for parameter in self.parameters() if id(parameter) not in projections]

    @final
    def weight_of_commitment(self, weight: float, follows_hardness: bool) -> Tensor | float:
        """The weight of a commitment loss: where it follows hardness, times that in training."""
        # A copy, as in `blend`.
        return weight * self.hardness.clone() if follows_hardness and self.training else weight

    def _check(self, z: Tensor, mask: Tensor | None) -> None:
        if not z.is_floating_point():
            raise UserError(f"{type(self).__name__}: z must be floating-point, got {z.dtype}")
        if z.ndim == 0 or z.shape[-1] != self.dim:
            raise UserError(
                f"{type(self).__name__}: the last axis of z must be dim={self.dim}, got shape {tuple(z.shape)}; "
                "channels go last (pictures: z.movedim(1, -1))"
            )
        if mask is not None and (mask.shape != z.shape[:-1] or mask.dtype != torch.bool):
            raise UserError(
                f"{type(self).__name__}: mask must be bool with shape {tuple(z.shape[:-1])}, "
                f"got {mask.dtype} with shape {tuple(mask.shape)}"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Quantizer":
        return keeping_float32(self, fn, super()._apply, ("hardness", *self.float32_buffers))

    @property
    def float32_buffers(self) -> tuple[str, ...]:
        """Names of buffers that stay float32 when the module is cast, for sums that a short type would lose."""
        return ()


def keeping_float32(
    module: ModuleType,
    fn: Callable[[Tensor], Tensor],
    apply: Callable[[Callable[[Tensor], Tensor]], ModuleType],
    names: tuple[str, ...],
) -> ModuleType:
    """Move or cast a module as `nn.Module._apply` does, but leave the named buffers their values in float32."""
    exact = {name: buffer for name in names if (buffer := module._buffers[name]) is not None}
    apply(fn)
    for name, before in exact.items():
        after = module._buffers[name]
        if after is not None and after.dtype != torch.float32:
            module._buffers[name] = before.to(after.device)
    return module


def outermost(model: nn.Module) -> dict[str, Quantizer]:
    """The quantizers of a model by name, without those that another one is made of."""
    found: dict[str, Quantizer] = {}
    for name, part in model.named_modules():
        if isinstance(part, Quantizer) and not any(_is_within(name, outer) for outer in found):
            found[name] = part
    return found


def check_enough(quantizer: Quantizer, vectors: int) -> None:
    """See to it that there are vectors for all codes.

    Raises:
        UserError: There are fewer than codes, over all ranks.
    """
    codes = quantizer.codes_to_found
    if codes and vectors < codes:
        raise UserError(
            f"{type(quantizer).__name__}: k-means needs at least as many vectors as codes: codebook_size={codes}, "
            f"vectors={vectors}; give more vectors at once, take fewer codes, or start from init='normal'"
        )


def projecting_as(other: Quantizer, made: QuantizerType) -> QuantizerType:
    """A quantizer that was just made, with the projections of another one, on its device and in its mode."""
    for mine, others in ((made.project_in, other.project_in), (made.project_out, other.project_out)):
        if mine is not None and others is not None:
            mine.load_state_dict(others.state_dict())
    return made.to(other.hardness.device).train(other.training)


def _is_within(name: str, outer: str) -> bool:
    return outer == "" or name.startswith(f"{outer}.")


def _leading(keep: Bool[Tensor, "*batch"], indices: Int[Tensor, "..."]) -> Bool[Tensor, "..."]:
    return keep.reshape(keep.shape + (1,) * (indices.ndim - keep.ndim))


def _projected(values: Float[Tensor, "*batch given"], by: nn.Linear | None) -> Float[Tensor, "*batch made"]:
    if by is None:
        return values
    # In float32 also where the module was cast, as all of a quantizer.
    return linear(values, by.weight.float(), by.bias.float())
