"""The nearest code in native code, where it was compiled: `native/nearest_code.cpp` says how it goes.

It is apart because it is optional: `hatch_build.py` compiles it when the package is installed and there is a compiler.
"""

import ctypes
import os
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float32, Int
from torch import Tensor

from provq.ops.native import loaded

_LIBRARY = Path(__file__).parent / "native" / "nearest_code.so"
_PROCESS = os.getpid()  # the threads of torch do not outlive a fork


def registers() -> int:
    """The bytes of a register that the native search uses here: 64, 32 or 16; 0 without a search that is any good."""
    library = _library()
    return 0 if library is None else int(library.provq_register())


def nearest_code_native(
    vectors: Float32[Tensor, "n dim"], codebook: Float32[Tensor, "codes dim"], register: int | None = None
) -> Int[Tensor, " n"]:
    """The index of the code nearest to each vector, the lowest of equals; -1 where squares of lengths are not finite.

    Args:
        vectors: What is looked up.
        codebook: At least one code. If the squared length of one is not finite, no vector finds its code.
        register: Use registers of so many bytes, at most those of the processor: 64, 32 or 16. None: as wide as may be.
    """
    library = _library()
    if library is None:
        raise RuntimeError("the native search is not built")
    vectors, codebook = vectors.contiguous(), codebook.contiguous()
    found = torch.empty(len(vectors), dtype=torch.int64)
    library.provq_nearest_code(
        vectors.data_ptr(), len(vectors), codebook.data_ptr(), len(codebook), codebook.shape[1],
        register or registers(), torch.get_num_threads(), os.getpid() == _PROCESS, found.data_ptr(),
    )  # fmt: skip
    return found


@cache
def _library() -> ctypes.CDLL | None:
    library = loaded(_LIBRARY)
    if library is None:
        return None
    number, address = ctypes.c_int64, ctypes.c_void_p
    library.provq_nearest_code.argtypes = [
        address, number, address, number, number, ctypes.c_int, ctypes.c_int, ctypes.c_bool, address,
    ]  # fmt: skip
    library.provq_nearest_code.restype = None
    return library
