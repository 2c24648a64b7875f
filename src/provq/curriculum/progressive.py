"""`Progressive`: any third-party quantizer becomes progressive without being touched."""

from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provq.errors import UserError
from provq.quantizers.base import Quantizer, keeping_float32


@final
class Progressive(nn.Module):
    """Blends what a quantizer module returns with what went in: lerp(z, module(z).quantized, hardness).

    The one output that has the input's shape and kind is blended; everything else that the module returns, and the
    type in which it returns it, passes unchanged. At hardness 1 and in evaluation the result is the module's own,
    to the bit.

    Args:
        module: A quantizer whose forward takes the latents first and returns a tensor, tuple, named tuple or
            mapping.
        output: Which output is the quantized one, by its place or name, where more than one has the input's shape.
        relax: The continuous image of the latents where that is not the latents themselves, such as a
            normalisation onto the unit sphere for codes that live there.

    Raises:
        UserError: The module holds one of provq's own quantizers, which blends already.
    """

    hardness: Tensor

    def __init__(
        self,
        module: nn.Module,
        output: int | str | None = None,
        relax: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        for name, part in module.named_modules():
            if isinstance(part, Quantizer | Progressive):
                raise UserError(
                    f"Progressive: {type(part).__name__}{f' ({name})' if name else ''} is progressive by itself; "
                    "use it without the wrapper"
                )
        self.module = module
        self.output = output
        self.relax = relax
        self.register_buffer("hardness", torch.ones(()), persistent=False)

    def forward(self, z: Float[Tensor, "..."], *args: Any, **kwargs: Any) -> Any:
        """What the module returns for `z`, with its quantized output blended.

        Raises:
            UserError: No output, or more than one, has the shape of `z`.
        """
        outputs = self.module(z, *args, **kwargs)
        if not self.training:
            return outputs
        relaxed = z if self.relax is None else self.relax(z)
        return _with_blend(outputs, relaxed, self.hardness, self.output, owner=type(self.module).__name__)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Progressive":
        return keeping_float32(self, fn, super()._apply, ("hardness",))


def _with_blend(outputs: Any, z: Tensor, hardness: Tensor, chosen: int | str | None, *, owner: str) -> Any:
    if isinstance(outputs, Tensor):
        places: dict[Any, Any] = {None: outputs}
    elif isinstance(outputs, Mapping):
        places = dict(outputs)
    elif isinstance(outputs, tuple | list):
        places = dict(enumerate(outputs))
        if isinstance(chosen, str) and chosen in getattr(outputs, "_fields", ()):
            chosen = outputs._fields.index(chosen)  # type: ignore[union-attr]  # a named tuple
    else:
        raise UserError(f"Progressive: {owner} returns a {type(outputs).__name__}; expected a tensor, tuple or mapping")
    fitting = [
        place
        for place, value in places.items()
        if isinstance(value, Tensor)
        and value.shape == z.shape
        and value.is_floating_point()
        and chosen in (None, place)
    ]
    if len(fitting) != 1:
        raise UserError(
            f"Progressive: expected exactly one output of {owner} with the input's shape {tuple(z.shape)}, "
            f"found {len(fitting)}; name it by output="
        )
    place = fitting[0]
    quantized = places[place]
    blended = torch.lerp(z.to(quantized.dtype), quantized, hardness.to(quantized.dtype))
    if place is None:
        return blended
    if isinstance(outputs, Mapping):
        return type(outputs)({**outputs, place: blended})  # type: ignore[call-arg]
    if hasattr(outputs, "_replace"):
        return outputs._replace(**{outputs._fields[place]: blended})
    values = list(outputs)
    values[place] = blended
    return type(outputs)(values)
