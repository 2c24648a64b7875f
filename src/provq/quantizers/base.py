"""The contract of every quantizer, and the one forward pass that all of them share.

A quantizer knows codebooks and blends; it knows no step. `hardness` says how much of what the decoder reads is
the code: 0 is a continuous autoencoder, 1 are discrete tokens. Only training mode reads it; evaluation is hard.

    z --relax--> u --assign--> indices --lookup--> q --estimate--> q with a gradient --+
                 |                                                                     lerp(., hardness) --> quantized
                 +---------------------------------------------------------------------+
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple, TypeVar, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from provq.errors import UserError

ModuleType = TypeVar("ModuleType", bound=nn.Module)


class Quantized(NamedTuple):
    """What a quantizer returns.

    `indices` are int64, -1 where there is no token (masked or not finite); quantizers with several codebooks
    add one last axis. `loss` is the sum of the quantizer's own terms, already weighted.
    """

    quantized: Float[Tensor, "*batch dim"]
    indices: Int[Tensor, "..."]
    loss: Float[Tensor, ""]


class Quantizer(nn.Module, ABC):
    """A map from vectors to codes and back; channels are last and any axes may lead.

    Attributes:
        dim: Length of the vectors that come in and go out.
        codebook_sizes: Number of codes, one entry a codebook; empty where nothing is quantized.
        hardness: 0-dim float32 buffer in [0, 1], 1 at construction; it is not part of the saved state.
    """

    hardness: Tensor

    def __init__(self, dim: int, codebook_sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.dim = dim
        self.codebook_sizes = codebook_sizes
        self.register_buffer("hardness", torch.ones(()), persistent=False)

    @abstractmethod
    def relax(self, z: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """The continuous image of `z` that is compared with codes: the identity, the unit sphere, a box."""

    @abstractmethod
    def assign(self, u: Float[Tensor, "*batch dim"]) -> Int[Tensor, "..."]:
        """The index of the nearest code of each vector; no gradient passes."""

    @abstractmethod
    def lookup(self, indices: Int[Tensor, "..."]) -> Float[Tensor, "*batch dim"]:
        """The values that indices stand for, all that decoding needs; -1 stands for zeros.

        Raises:
            IndexError: An index is neither -1 nor that of a code.
        """

    @abstractmethod
    def estimate(self, u: Float[Tensor, "*batch dim"], q: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Exactly `q`, with the gradient to `u` that the quantizer trains by."""

    @abstractmethod
    def penalty(
        self, u: Float[Tensor, "*batch dim"], q: Float[Tensor, "*batch dim"], keep: Bool[Tensor, "*batch"]
    ) -> Float[Tensor, ""]:
        """The sum of the quantizer's own loss terms, weighted; means over kept tokens and over dims."""

    def begin(self, u: Float[Tensor, "*batch dim"], keep: Bool[Tensor, "*batch"]) -> None:
        """Hook: a start that needs data, before the first assignment in training. Nothing by default."""

    def adapt(self, u: Float[Tensor, "*batch dim"], indices: Int[Tensor, "..."], keep: Bool[Tensor, "*batch"]) -> None:
        """Hook: what a codebook learns from a training batch other than by gradient. Nothing by default."""

    def found(self, latents: Float[Tensor, "n dim"]) -> None:
        """Hook: settle the codebook anew on latents of this rank, as `relax` gives them. Nothing by default.

        All ranks must call it together.
        """

    @property
    def codes_to_found(self) -> int:
        """Hook: how many codes `found` settles; a hand-over passes over a quantizer where it is 0, the default."""
        return 0

    def rest(self, resting: bool) -> None:
        """Hook: learn nothing as long as `resting`, since a hand-over lies ahead. Nothing by default."""

    def found_on_next_batch(self) -> None:
        """Hook: do what `found` does, with the latents of the next training batch. Nothing by default."""

    @property
    def awaits_latents(self) -> bool:
        """Hook: whether the codebook is to be settled on the next latents. Never by default."""
        return False

    def steady(self) -> None:
        """Hook: from now on rewrite no code at random, since the run is about to end. Nothing by default."""

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
            finite = z.isfinite().all(-1)
            keep = finite if mask is None else finite & mask
            u = self.relax(torch.where(finite[..., None], z.float(), 0.0))
            if self.training:
                self.begin(u.detach(), keep)
            indices = self.assign(u.detach())
            q = self.lookup(indices) if self.codebook_sizes else u
            loss = self.penalty(u, q, keep)
            values = self.estimate(u, q)
            if self.training:
                values = torch.lerp(u, values, self.hardness)
                self.adapt(u.detach(), indices, keep)
            values = torch.where(finite[..., None], values, z.float())
        if mask is not None:
            values = torch.where(mask[..., None], values, 0.0)
        indices = torch.where(keep.reshape(keep.shape + (1,) * (indices.ndim - keep.ndim)), indices, -1)
        return Quantized(values.to(z.dtype), indices, loss)

    @property
    def weight_of_commitment(self) -> Tensor | float:
        """The factor in [0, 1] of a commitment that follows hardness; 1 in evaluation."""
        return self.hardness if self.training else 1.0

    def _check(self, z: Tensor, mask: Tensor | None) -> None:
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


def masked_mean(values: Float[Tensor, "*batch dim"], keep: Bool[Tensor, "*batch"]) -> Float[Tensor, ""]:
    """The mean over kept tokens and over dims; 0 where nothing is kept."""
    total = torch.where(keep[..., None], values, 0.0).sum()
    return total / (keep.sum() * values.shape[-1]).clamp_min(1)
