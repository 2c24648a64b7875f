"""A mask over tokens that costs nothing where it hides none, as in almost every batch."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def where_kept(
    keep: Bool[Tensor, "*batch"], values: Float[Tensor, "*batch dim"], other: Float[Tensor, "*batch dim"] | float
) -> Float[Tensor, "*batch dim"]:
    """The values of kept tokens and `other` elsewhere; the very tensor `values` where it is seen that all are kept."""
    return values if is_seen(keep.all()) else torch.where(keep[..., None], values, other)


def is_seen(condition: Bool[Tensor, ""]) -> bool:
    """Whether a condition holds and can be looked at for nothing."""
    return can_be_seen(condition) and bool(condition)


def can_be_seen(tensor: Tensor) -> bool:
    """Whether values can be looked at for nothing: a GPU would have to wait, a compiler cannot.

    Nor can they be seen in a tensor that has a shape and no values.
    """
    has_values = tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor)
    return has_values and not torch.compiler.is_compiling()
