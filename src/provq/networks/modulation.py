"""Scales and biases by the number of stages, with which one decoder serves every prefix (ProGIC, arXiv 2603.02897)."""

from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@final
class StageModulation(nn.Module):
    """A scale and a bias for each channel, of their own for each number of stages; at first 1 and 0.

    Args:
        stages: The largest number of stages.
        width: Number of channels.
    """

    def __init__(self, stages: int, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(stages, width))
        self.bias = nn.Parameter(torch.zeros(stages, width))

    def forward(
        self, values: Float[Tensor, "b width rows columns"], prefix: Int[Tensor, " b"] | None = None
    ) -> Float[Tensor, "b width rows columns"]:
        """The values of each item, scaled and shifted as its number of stages has it; all stages by default."""
        row = slice(-1, None) if prefix is None else prefix - 1
        # In the type of the values, so that under autocast they stay short.
        scale, bias = (table[row][..., None, None].to(values.dtype) for table in (self.scale, self.bias))
        return values * scale + bias
