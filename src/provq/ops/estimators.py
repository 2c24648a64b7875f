"""Gradient estimators: the value is the hard code to the bit, the gradient is what the method says.

Nothing else than these functions decides how a gradient passes a code, so that every quantizer can use each.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def straight_through(u: Float[Tensor, "*batch dim"], q: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
    """The code `q` with the identity as its gradient to `u` (Bengio et al., arXiv 1308.3432).

    It is q to the bit, and costs a copy; the usual u + (q - u).detach() rounds.
    """
    passed: Tensor = _StraightThrough.apply(u, q.detach())  # type: ignore[no-untyped-call]  # torch does not type it
    return passed


def rotation(u: Float[Tensor, "*batch dim"], q: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
    """The code `q` with the gradient of the rotation and scaling that carry `u` to `q` (arXiv 2410.06424, eq. 4).

    The map is (|q| / |u|) R with R = I - 2 w w' + 2 q^ u^', w the unit vector along u^ + q^; it is constant for
    the gradient. Where u or q is zero, or the two are opposite, R is not defined and the gradient is the identity.
    """
    q = q.detach()
    source, target = u.detach(), q
    source_norm = source.norm(dim=-1, keepdim=True)
    target_norm = target.norm(dim=-1, keepdim=True)
    tiny = torch.finfo(u.dtype).tiny
    source_unit = source / source_norm.clamp_min(tiny)
    target_unit = target / target_norm.clamp_min(tiny)
    bisector = source_unit + target_unit
    bisector_norm = bisector.norm(dim=-1, keepdim=True)
    defined = (source_norm > tiny) & (target_norm > tiny) & (bisector_norm > 1e-3)
    bisector = bisector / torch.where(defined, bisector_norm, 1.0)
    scale = torch.where(defined, target_norm / source_norm.clamp_min(tiny), 1.0)
    reflected = bisector * (bisector * u).sum(-1, keepdim=True)
    carried = target_unit * (source_unit * u).sum(-1, keepdim=True)
    turned = torch.where(defined, scale * (u - 2 * reflected + 2 * carried), u)
    return q + (turned - turned.detach())


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, u: Tensor, q: Tensor) -> Tensor:
        return q.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
