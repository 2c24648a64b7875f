"""Samples and reference statistics as published tables exchange them: the `.npz` files of ADM and of pytorch-fid.

`arr_0` holds 8-bit pictures (n, height, width, 3), `arr_1` the numbers of their classes if they have any. References of
ADM hold `mu` and `sigma` besides, the statistics of their features, which may be those of more pictures than the file
shows. Nothing that is read can run code.
"""

import math
import struct
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from numpy.lib import format as npy
from torch import Tensor

from provq.errors import UsageError, UserError
from provq.evaluation.distribution import Gaussian
from provq.files import appearing

_LARGEST_SIDE = 4096
_LARGEST_DIM = 8192


class _Entry(NamedTuple):
    shape: tuple[int, ...]
    dtype: np.dtype
    is_by_columns: bool
    file: IO[bytes]  # at the first number


class Place(NamedTuple):
    """Where the pictures of a file of samples lie, one behind the other, as (height, width, 3)."""

    number: int
    height: int
    width: int
    offset: int


def eight_bits(pictures: Float[Tensor, "b 3 h w"]) -> UInt8[Tensor, "b 3 h w"]:
    """Pictures in [-1, 1] as they would be saved: published numbers are of files."""
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def write_samples(
    path: str | Path,
    batches: Iterable[UInt8[Tensor, "_ 3 h w"]],
    count: int,
    labels: Int[Tensor, " count"] | None = None,
) -> None:
    """Write pictures as `arr_0`, one batch at a time, and their classes as `arr_1`.

    Args:
        path: The file, which appears whole or not at all; missing folders are made.
        batches: The pictures, all of one size.
        count: How many there are in all.
        labels: Their classes; left out, they have none.

    Raises:
        UsageError: There are more or fewer pictures or classes, or pictures differ in size or are not of 8 bits.
    """
    if labels is not None and len(labels) != count:
        raise UsageError(f"{path}: {count} samples were announced, and there are {len(labels)} classes")
    written, size = 0, None
    with appearing(Path(path)) as unfinished, zipfile.ZipFile(unfinished, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            for batch in batches:
                if size is None:
                    size = (3, *batch.shape[2:])
                    shape = (count, *batch.shape[2:], 3)
                    npy.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
                if batch.dtype != torch.uint8 or batch.shape[1:] != size:
                    found = f"{batch.dtype} {tuple(batch.shape[1:])}"
                    raise UsageError(f"{path}: samples are 8-bit pictures of one size, {size}, got {found}")
                file.write(batch.permute(0, 2, 3, 1).contiguous().cpu().numpy().tobytes())
                written += len(batch)
            if written != count or size is None:
                raise UsageError(f"{path}: {count} samples were announced and {written} came")
        if labels is not None:
            with archive.open("arr_1.npy", "w") as file:
                npy.write_array(file, labels.cpu().numpy(), version=(1, 0))


def read_samples(path: str | Path, *, batch_size: int = 64) -> Iterator[UInt8[Tensor, "_ 3 h w"]]:
    """The pictures of `arr_0`, one batch at a time: no more than that is ever in memory.

    Args:
        path: The file.
        batch_size: Pictures at a time, at least 1.

    Raises:
        UserError: The file is not there, is damaged, or holds something else.
    """
    path = Path(path)
    with _opened(path) as archive, _pictures(archive, path) as (number, height, width, file):
        for start in range(0, number, batch_size):
            batch = (min(batch_size, number - start), height, width, 3)
            content = bytearray(file.read(math.prod(batch)))
            yield torch.from_numpy(np.frombuffer(content, np.uint8).reshape(batch)).permute(0, 3, 1, 2)


def place_of_samples(path: str | Path) -> Place:
    """Where the pictures of `arr_0` lie in a file, so that each can be read by itself.

    Raises:
        UserError: The file is not there, is damaged, holds something else, or is compressed.
    """
    path = Path(path)
    with _opened(path) as archive, _pictures(archive, path) as (number, height, width, file):
        entry = archive.getinfo("arr_0.npy")
        if entry.compress_type != zipfile.ZIP_STORED:
            raise UserError(f"{path}: its pictures are compressed; write them with numpy.savez")
        with path.open("rb") as whole:
            # An entry's numbers lie behind 30 bytes, two of whose fields say how long its name and more about it are.
            whole.seek(entry.header_offset + 26)
            behind = 30 + sum(struct.unpack("<HH", whole.read(4)))
        return Place(number, height, width, entry.header_offset + behind + file.tell())


def read_labels(path: str | Path) -> Int[Tensor, " n"] | None:
    """The classes in `arr_1`, or None where there is none.

    Raises:
        UserError: The file is not there, is damaged, or `arr_1` holds something else than classes.
    """
    path = Path(path)
    with _opened(path) as archive:
        if "arr_1.npy" not in archive.namelist():
            return None
        with _entry(archive, "arr_1", path) as (shape, dtype, _, file):
            if dtype.kind not in "ui" or len(shape) != 1:
                raise UserError(f"{path}: arr_1: expected whole numbers (n,), the classes, found {dtype} {shape}")
            return torch.from_numpy(np.frombuffer(file.read(), dtype).astype(np.int64))


def holds_statistics(path: str | Path) -> bool:
    """Whether a file holds the statistics of features, and not pictures alone.

    Raises:
        UserError: The file is not there, or is no npz file.
    """
    with _opened(Path(path)) as archive:
        return {"mu.npy", "sigma.npy"} <= set(archive.namelist())


def write_statistics(path: str | Path, statistics: Gaussian) -> None:
    """Write the statistics of features as `mu` and `sigma`, which pytorch-fid reads.

    Args:
        path: The file, which appears whole or not at all; missing folders are made.
        statistics: What to write, in float64.
    """
    mean, covariance = (tensor.detach().double().cpu().numpy() for tensor in statistics)
    with appearing(Path(path)) as unfinished, unfinished.open("wb") as file:
        np.savez(file, mu=mean, sigma=covariance)


def read_statistics(path: str | Path) -> Gaussian:
    """The `mu` and `sigma` of a reference file, in float64.

    Args:
        path: The file.

    Raises:
        UserError: The file is not there, is damaged, holds no statistics, or some that are none.
    """
    path = Path(path)
    with _opened(path) as archive:
        mean, covariance = (_statistic(archive, name, path) for name in ("mu", "sigma"))
    dim = len(mean) if mean.ndim == 1 else 0
    if not dim or covariance.shape != (dim, dim):
        raise UserError(
            f"{path}: expected mu (dim) and sigma (dim, dim), found {tuple(mean.shape)} and {tuple(covariance.shape)}"
        )
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise UserError(f"{path}: mu or sigma holds numbers that are not finite")
    return Gaussian(mean, covariance)


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive; what goes wrong while it is read becomes the user's sentence."""
    if not path.is_file():
        raise UserError(f"there is no file {str(path)!r}")
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except UserError:
        raise
    except Exception as error:  # zipfile and numpy raise many types for damaged files
        raise UserError(f"{path}: cannot be read as an npz file: {error or type(error).__name__}") from error


@contextmanager
def _pictures(archive: zipfile.ZipFile, path: Path) -> Iterator[tuple[int, int, int, IO[bytes]]]:
    """Number, height and width of the pictures, and the file at the first of their values."""
    with _entry(archive, "arr_0", path) as (shape, dtype, is_by_columns, file):
        number, height, width, channels = shape if len(shape) == 4 else (0, 0, 0, 0)
        if dtype != np.uint8 or channels != 3 or is_by_columns:
            found = f"{dtype} {shape}{' by columns' if is_by_columns else ''}"
            raise UserError(f"{path}: arr_0: expected 8-bit pictures, uint8 (n, height, width, 3), found {found}")
        if not (0 < height <= _LARGEST_SIDE and 0 < width <= _LARGEST_SIDE):
            raise UserError(f"{path}: arr_0: sides from 1 to {_LARGEST_SIDE} pixels can be read, found {shape}")
        yield number, height, width, file


@contextmanager
def _entry(archive: zipfile.ZipFile, name: str, path: Path) -> Iterator[_Entry]:
    """An array of the archive, once it is known to be of plain numbers and as long as it says."""
    if f"{name}.npy" not in archive.namelist():
        held = ", ".join(entry.removesuffix(".npy") for entry in archive.namelist()[:8])
        raise UserError(f"{path}: holds no {name!r}; it has: {held or 'nothing'}")
    with archive.open(f"{name}.npy") as file:
        version = npy.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"arrays of format {version} are not known")
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, is_by_columns, dtype = read(file)
        if dtype.hasobject or dtype.kind not in "uif":
            raise UserError(f"{path}: {name}: expected plain numbers, found {dtype}; pickled objects are not read")
        length, held_length = dtype.itemsize * math.prod(shape), archive.getinfo(file.name).file_size - file.tell()
        if length != held_length or min(shape, default=0) < 0:
            raise UserError(f"{path}: {name}: {shape} takes {length} bytes, but the file holds {held_length}")
        yield _Entry(shape, dtype, is_by_columns, file)


def _statistic(archive: zipfile.ZipFile, name: str, path: Path) -> Tensor:
    with _entry(archive, name, path) as (shape, dtype, is_by_columns, file):
        if dtype.kind != "f" or len(shape) > 2 or max(shape, default=0) > _LARGEST_DIM:
            raise UserError(
                f"{path}: {name}: expected floats over at most {_LARGEST_DIM} features, found {dtype} {shape}"
            )
        numbers = np.frombuffer(file.read(), dtype).reshape(shape, order="F" if is_by_columns else "C")
        return torch.from_numpy(numbers.astype(np.float64))
