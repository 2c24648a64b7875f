"""What quantizers that are made of quantizers share: indices side by side, and hardness one after the other."""

from collections.abc import Iterator, Sequence
from copy import deepcopy

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from provq.errors import UsageError
from provq.ops.collectives import sum_over_ranks
from provq.quantizers.base import Quantizer, check_enough


def check_members(owner: str, argument: str, members: Sequence[Quantizer]) -> None:
    """See to it that there are members, that each makes tokens, and that latents reach each of them as they are.

    Raises:
        UsageError: There is none, one is no quantizer or makes no tokens, one projects or needs a grid, or one stands
            there twice.
    """
    if not isinstance(members, tuple) or not members:
        raise UsageError(f"{owner}: {argument} must hold at least one quantizer, got {members!r}")
    for place, member in enumerate(members):
        if not isinstance(member, Quantizer):
            raise UsageError(f"{owner}: {argument}[{place}] must be a quantizer, got {type(member).__name__}")
        if not member.codebook_sizes:
            raise UsageError(f"{owner}: {argument}[{place}] is a {type(member).__name__}, which makes no tokens")
        if type(member).evidence is not Quantizer.evidence:
            raise UsageError(
                f"{owner}: {argument}[{place}] is a {type(member).__name__}, which settles on means over a whole grid; "
                "let it be the outer one"
            )
        if member.code_dim != member.dim:
            raise UsageError(
                f"{owner}: {argument}[{place}] projects from dim={member.dim} to {member.code_dim} by itself; "
                f"let its dim be the length of its codes, and give dim={member.dim} to the {owner}"
            )
        parts = set(member.modules())
        if any(parts & set(other.modules()) for other in members[:place]):
            raise UsageError(
                f"{owner}: {argument}[{place}] stands there twice, or a part of it; each needs its own codebook"
            )


def baked_members(members: Sequence[Quantizer]) -> tuple[Quantizer, ...]:
    """Members with plain tables, none of them shared with the old owner."""
    return tuple(deepcopy(member) if (baked := member.baked()) is member else baked for member in members)


def check_start(owner: Quantizer, keep: Bool[Tensor, "*batch"]) -> None:
    """See to it that a first batch has enough tokens for all members, before the first of them settles on it.

    Raises:
        UserError: There are fewer tokens over all ranks than codes of a member, but not none.
    """
    # A compiled graph cannot stop to look; there k-means itself complains.
    if not torch.compiler.is_compiling() and (number := int(sum_over_ranks(keep.sum()))):
        check_enough(owner, number)


def joined(owner: Quantizer, members: Sequence[Quantizer], parts: Sequence[Tensor]) -> Int[Tensor, "..."]:
    """The indices of members side by side on a last axis; without that axis where there is one codebook in all."""
    together = torch.cat(
        [part[..., None] if _is_single(member) else part for member, part in zip(members, parts, strict=True)], -1
    )
    return together[..., 0] if _is_single(owner) else together


def columns(
    owner: Quantizer, members: Sequence[Quantizer], indices: Int[Tensor, "..."]
) -> Iterator[tuple[Quantizer, Int[Tensor, "..."]]]:
    """Each member with its own indices, in the shape that it gives them in."""
    together = indices[..., None] if _is_single(owner) else indices
    parts = torch.split(together, [len(member.codebook_sizes) for member in members], -1)
    for member, part in zip(members, parts, strict=True):
        yield member, part[..., 0] if _is_single(member) else part


def staggered(hardness: Float[Tensor, ""], members: Sequence[Quantizer], stagger: float) -> None:
    """Give members their hardness, each over a part of the whole: the i-th of n begins at i * stagger / n.

    All parts are as long as that of the last, which ends at 1.
    """
    number = len(members)
    length = 1 - stagger * (number - 1) / number
    for place, member in enumerate(members):
        share = ((hardness - place * stagger / number) / length).clamp(0, 1)
        # At the end to the last digit, whatever rounding leaves of it.
        member.hardness.copy_(torch.where(hardness == 1, 1.0, share))
        member.pass_on_hardness()


def _is_single(quantizer: Quantizer) -> bool:
    return len(quantizer.codebook_sizes) == 1
