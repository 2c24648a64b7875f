"""SiLU of a group normalisation, in native code on a CPU: `native/group_norm.cpp` says how it goes.

It is apart because it is optional. With channels last torch is slow at it, at its gradients above all, and keeps what
lies between the two.
"""

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn
from torch.nn.functional import group_norm, silu

from provq.ops.native import loaded

_LIBRARY = Path(__file__).parent / "native" / "group_norm.so"
_PROCESS = os.getpid()  # the threads of torch do not outlive a fork


def silu_of_group_norm(
    values: Float[Tensor, "b channels *positions"], norm: nn.GroupNorm
) -> Float[Tensor, "b channels *positions"]:
    """What `silu(norm(values))` is.

    Native code computes it on a CPU for float32 with channels last in memory, where it was compiled and no compiler is
    at work; it does not call `norm`, whose hooks do not run then.
    """
    if not _suits_native(values, norm):
        return silu(norm(values))
    arguments = values, norm.weight, norm.bias, norm.num_groups, norm.eps, registers()
    made: Tensor = _SiluOfGroupNorm.apply(*arguments)  # type: ignore[no-untyped-call]
    return made


@cache
def registers() -> int:
    """The bytes of a register that native code uses here: 64, 32 or 16; 0 where it was not compiled."""
    library = _library()
    return 0 if library is None else int(library.provq_register())


def _suits_native(values: Tensor, norm: nn.GroupNorm) -> bool:
    return (
        values.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and values.ndim == 4
        and values.shape[1] == norm.num_channels
        and values.numel() > norm.num_groups  # torch refuses groups of a single value
        and norm.affine
        and _is_plain(values, torch.channels_last)
        and _is_plain(norm.weight, torch.contiguous_format)
        and _is_plain(norm.bias, torch.contiguous_format)
        and registers() > 0
    )


def _is_plain(values: Tensor, layout: torch.memory_format) -> bool:
    """Whether these are float32 that lie in memory in this order: neither a shape alone nor a part of something."""
    return (
        type(values) in (Tensor, nn.Parameter)
        and values.dtype == torch.float32
        and values.device.type == "cpu"
        and values.is_contiguous(memory_format=layout)
    )


@final
class _SiluOfGroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Float32[Tensor, "b channels rows columns"],
        weight: Float32[Tensor, " channels"],
        bias: Float32[Tensor, " channels"],
        groups: int,
        epsilon: float,
        register: int,
    ) -> Float32[Tensor, "b channels rows columns"]:
        statistics = values.new_empty(len(values), groups, 2, dtype=torch.float64)
        made = torch.empty_like(values)
        _called(
            "provq_silu_of_group_norm",
            values.data_ptr(), weight.data_ptr(), bias.data_ptr(), *_sizes(values), groups, epsilon,
            register, *_threads(), statistics.data_ptr(), made.data_ptr(),
        )  # fmt: skip
        ctx.save_for_backward(values, weight, bias, statistics)
        ctx.groups, ctx.epsilon, ctx.register = groups, epsilon, register
        return made

    @staticmethod
    def backward(ctx: Any, gradients: Float32[Tensor, "b channels rows columns"]) -> tuple[Tensor | None, ...]:
        values, weight, bias, statistics = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # these gradients shall have some of their own, which torch knows
            made = silu(group_norm(values, ctx.groups, weight, bias, ctx.epsilon))
            inputs = [each for each, is_wanted in zip((values, weight, bias), wanted, strict=True) if is_wanted]
            found = iter(torch.autograd.grad(made, inputs, gradients, create_graph=True))
            return *(next(found) if is_wanted else None for is_wanted in wanted), None, None, None
        gradients = gradients.contiguous(memory_format=torch.channels_last)
        of_values = torch.empty_like(values) if wanted[0] else None
        of_weight, of_bias = torch.empty_like(weight), torch.empty_like(bias)
        _called(
            "provq_silu_of_group_norm_backward",
            values.data_ptr(), gradients.data_ptr(), weight.data_ptr(), bias.data_ptr(), statistics.data_ptr(),
            *_sizes(values), ctx.groups, ctx.register, *_threads(),
            None if of_values is None else of_values.data_ptr(), of_weight.data_ptr(), of_bias.data_ptr(),
        )  # fmt: skip
        return of_values, of_weight, of_bias, None, None, None


def _sizes(values: Float32[Tensor, "b channels rows columns"]) -> tuple[int, int, int]:
    """Samples, positions, channels."""
    samples, channels, rows, columns = values.shape
    return samples, rows * columns, channels


def _threads() -> tuple[int, bool]:
    """How many threads there are to work on, and whether those of torch are alive."""
    return torch.get_num_threads(), os.getpid() == _PROCESS


def _called(function: str, *arguments: Any) -> None:
    if not getattr(_library(), function)(*arguments):
        raise MemoryError("there is no memory to sum up values in")


@cache
def _library() -> ctypes.CDLL | None:
    library = loaded(_LIBRARY)
    if library is None:
        return None
    number, address = ctypes.c_int64, ctypes.c_void_p
    shape: list[Any] = [number] * 4
    threads: list[Any] = [ctypes.c_int, ctypes.c_int, ctypes.c_bool]
    forward, backward = library.provq_silu_of_group_norm, library.provq_silu_of_group_norm_backward
    forward.argtypes = [*[address] * 3, *shape, ctypes.c_double, *threads, *[address] * 2]
    backward.argtypes = [*[address] * 5, *shape, *threads, *[address] * 3]
    forward.restype = backward.restype = ctypes.c_bool
    return library
