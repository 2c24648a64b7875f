"""Networks in shards over ranks (FSDP2), for those that do not fit into one device; the quantizer stays whole.

    shard(model, mesh)          each parameter of its networks becomes this rank's part of it
    clip(parameters, largest)   gradients, of which some are parts
    whole(state)                what a checkpoint holds: the parts of all ranks put together
    like(value, parameter)      what a checkpoint holds, cut up again

All ranks call each of them together.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from provq.ops.collectives import from_first_rank, ranks, sum_over_ranks
from provq.tokenizer import Tokenizer


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Cut a network up, block by block; of a tokenizer encoder and decoder, for each rank searches all codebooks.

    Everything starts as the first rank has it. Gradients of what stays whole are averaged as they come.
    """
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.data = from_first_rank(value).contiguous()  # parts can be cut from this layout alone
    within = mesh["data_parallel"]
    for network in (model.encoder, model.decoder) if isinstance(model, Tokenizer) else (model,):
        for block in _blocks(network):
            fully_shard(block, mesh=within)
        # Hand-overs and measurements call each by itself, so each is cut up again after every call.
        fully_shard(network, mesh=within, reshard_after_forward=True)
    if isinstance(model, Tokenizer):
        if model.decoder.beside:  # then what training calls of it is not its forward pass
            register_fsdp_forward_method(model.decoder, "with_beside")
        for parameter in model.quantizer.parameters():
            parameter.register_post_accumulate_grad_hook(_average)  # type: ignore[no-untyped-call]
    return model


def clip(parameters: Iterable[nn.Parameter], largest: float) -> None:
    """Scale the gradients, of which some are parts and some are whole, so that the norm of all is at most `largest`."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    parts = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
    others = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    squares = sum_over_ranks(_sum_of_squares(parts)) + _sum_of_squares(others)
    scale = (largest / (squares.sqrt() + 1e-6)).clamp_max(1)
    for gradient in (*parts, *others):
        gradient.mul_(scale)


def is_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no part on any rank holds a value that is not finite."""
    # One answer, on the device of the tensors: ranks on GPUs exchange nothing that lies elsewhere.
    finite = [_local(tensor).isfinite().all() for tensor in tensors]
    return not finite or int(sum_over_ranks(torch.stack(finite).all().int())) == ranks()


def whole(state: dict[str, Any]) -> dict[str, Any]:
    """Nested tables with every tensor in one piece, on each rank."""
    pieces: dict[str, Any] = tree_map(lambda value: value.full_tensor() if isinstance(value, DTensor) else value, state)
    return pieces


def like(value: Any, parameter: Tensor) -> Any:
    """A tensor cut up as a parameter is; anything that has another shape, such as a count of steps, as it is."""
    if not isinstance(parameter, DTensor) or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def _blocks(network: nn.Module) -> list[nn.Module]:
    """What stands in the lists of a network and has parameters, the inner ones first."""
    lists = (module for module in network.modules() if isinstance(module, nn.ModuleList | nn.Sequential))
    blocks = [block for each in lists for block in each if not isinstance(block, nn.ModuleList | nn.Sequential)]
    return [block for block in reversed(blocks) if any(True for _ in block.parameters())]


def _average(parameter: Tensor) -> None:
    assert parameter.grad is not None
    # What earlier parts of an accumulated batch left is the same on all ranks, and its own mean.
    parameter.grad.copy_(sum_over_ranks(parameter.grad) / ranks())


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sum_of_squares(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.float().square().sum() for tensor in tensors]).sum() if tensors else torch.zeros(())
