"""Where a run begins that does not begin with fresh weights: at those of another tokenizer."""

from torch import nn

from provq.errors import UsageError
from provq.tokenizer import Tokenizer


def take_over(tokenizer: Tokenizer, other: Tokenizer) -> None:
    """Give a tokenizer the weights of another one, and its codebook where both quantizers are of one kind and size.

    Raises:
        UsageError: A network of the other has other weights than this one; the first of them is named.
    """
    for side in ("encoder", "decoder"):
        network, model = getattr(tokenizer, side), getattr(other, side)
        difference = _difference(network, model)
        if difference:
            raise UsageError(
                f"training.start_from: its {side} is another one: {difference}; "
                f"write the table {side!r} of its config.json into the recipe"
            )
        network.load_state_dict(model.state_dict())
    quantizer = tokenizer.quantizer
    if type(quantizer) is type(other.quantizer) and not _difference(quantizer, other.quantizer):
        quantizer.load_state_dict(other.quantizer.state_dict())


def _difference(module: nn.Module, model: nn.Module) -> str:
    """The first weight by which two modules differ in form, in words; empty where there is none."""
    wanted, given = _shapes(module), _shapes(model)
    for name in [*wanted, *given]:
        if wanted.get(name) != given.get(name):
            return f"{name} is {given.get(name, 'missing')} there and {wanted.get(name, 'missing')} here"
    return ""


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}
