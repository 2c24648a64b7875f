"""Batches of items of several lengths, filled up to that of the longest one, without computing what fills them up."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import pad

from provq.ops.masking import can_be_seen

_ALIKE = (
    0.75  # of the longest of a group, its shortest: pieces that are fewer and fuller are faster than many short ones
)


def by_length(
    network: Callable[..., Tensor], present: Bool[Tensor, "b length"], *parts: Shaped[Tensor, "b length ..."]
) -> Float[Tensor, "b length dim"]:
    """What a network makes of a batch, of items of about one length together and without what only fills them up.

    All at once where lengths cannot be looked at for nothing: on a GPU, or under a compiler. Behind the end of an item
    the output is void, whatever it is.

    Args:
        network: Makes of parts (n, length, ...) an output (n, length, dim); what it gives for an item must not depend
            on other items, nor on how far the item is filled up.
        present: Which positions there are; the last of them ends an item.
        parts: What the network takes.
    """
    if not can_be_seen(present) or not present.numel():
        return network(*parts)
    longest = present.shape[1]
    lengths = (present * torch.arange(1, longest + 1)).amax(1).clamp_min(1)
    groups = _groups(lengths)
    if len(groups) < 2:
        return network(*parts)
    made = [network(*(part[group, : int(lengths[group].max())] for part in parts)) for group in groups]
    filled = torch.cat([pad(each, (0, 0, 0, longest - each.shape[1])) for each in made])
    return filled[torch.cat(groups).argsort()]


def _groups(lengths: Int[Tensor, " b"]) -> list[Int[Tensor, " _"]]:
    """Which items are worked off together, the longest first."""
    groups: list[Tensor] = []
    rest = lengths.argsort(descending=True, stable=True)
    while len(rest):
        is_alike = lengths[rest] >= _ALIKE * lengths[rest[0]]
        groups.append(rest[is_alike])
        rest = rest[~is_alike]
    return groups
