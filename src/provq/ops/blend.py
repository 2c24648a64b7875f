"""Between latents and codes: how one hardness is spread over the tokens of a batch."""

from typing import Literal, assert_never

import torch
from jaxtyping import Float
from torch import Tensor

TokensHarden = Literal["together", "at_random", "nearest_first"]


def blended(
    u: Float[Tensor, "*batch dim"],
    values: Float[Tensor, "*batch dim"],
    hardness: Float[Tensor, ""],
    tokens_harden: TokensHarden,
) -> Float[Tensor, "*batch dim"]:
    """`u` at hardness 0, `values` at 1; in between, each token by a hardness of its own whose mean is that of all.

    Args:
        u: Latents.
        values: Their codes, with whatever gradient these pass.
        hardness: In [0, 1].
        tokens_harden: "together": every token lies on the straight line, at the same share of the way. "at_random":
            each token is its latent or, with the probability `hardness`, its code, so that what reads it sees nothing
            in between. "nearest_first": the share `hardness` of the tokens that are nearest to their codes are codes.
    """
    match tokens_harden:
        case "together":
            return torch.lerp(u, values, hardness)
        case "at_random":
            # Drawn from [0, 1): never at hardness 0, always at 1.
            are_codes = torch.rand_like(u[..., 0]) < hardness
        case "nearest_first":
            errors = (values.detach() - u.detach()).square().sum(-1)
            ranks = errors.flatten().argsort().argsort().view(errors.shape)
            are_codes = ranks < hardness * errors.numel()
        case never:
            assert_never(never)
    return torch.where(are_codes[..., None], values, u)
