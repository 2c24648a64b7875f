"""Indices to bytes and back, as close to the entropy of a model as whole numbers come.

    indices --model--> frequencies that sum to 2^24 --range coder (constriction)--> 32-bit words, little-endian

Coder and decoder must agree on each frequency to the last digit, on every machine. So frequencies are whole numbers
(`frequencies`), made from counts by whole arithmetic, and a prior's floats are rounded to them once, in one way.
"""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, final

import numpy as np
from jaxtyping import Float, Int

from provq.errors import UserError
from provq.tokens.packing import Reader, as_bytes, deflated, inflated

PRECISION = 24  # bits of a frequency, what constriction's coders work with
_WHOLE = 1 << PRECISION
MOST_CODES = 1 << 22  # each code takes one of the 2^24 parts at least, and something must be left to tell them apart
_HEADROOM = 62  # bits of whole arithmetic before int64 overflows

Prior = Callable[[Int[np.ndarray, " n"]], Float[np.ndarray, " codes"]]


class Coding(ABC):
    """A way to write indices below a size; what it writes says all that it needs but their number and the size.

    Attributes:
        name: What it is called on the command line.
        number: What it is called in a file.
    """

    name: ClassVar[str]
    number: ClassVar[int]

    @abstractmethod
    def encode(self, indices: Int[np.ndarray, " n"], size: int) -> bytes:
        """The bytes that stand for indices.

        Args:
            indices: Whole numbers in [0, size).
            size: How many codes there are.

        Raises:
            UserError: An index is out of range, there are too many codes, or `constriction` is not installed.
        """

    @abstractmethod
    def decode(self, data: bytes, count: int, size: int) -> Int[np.ndarray, " n"]:
        """The indices that bytes stand for, as int64.

        Args:
            data: What `encode` gave.
            count: How many indices there are.
            size: How many codes there are.

        Raises:
            UserError: The bytes are not what `encode` gave for so many, or `constriction` is not installed.
        """


@final
class StaticCoding(Coding):
    """One model for all indices: how often each code occurs, which is written in front of them.

    A code that does not occur costs nothing, neither there nor here.
    """

    name = "static"
    number = 0

    def encode(self, indices: Int[np.ndarray, " n"], size: int) -> bytes:
        """The histogram, and behind it the indices."""
        _check(indices, size)
        counts = np.bincount(indices, minlength=size).astype(np.int64)
        used = np.flatnonzero(counts)
        gaps = np.diff(used, prepend=-1) - 1
        # First all gaps, then all counts, in which a general compressor finds what is alike.
        histogram = deflated(as_bytes([len(used), *gaps.tolist(), *counts[used].tolist()]))
        front = as_bytes([len(histogram)]) + histogram
        if len(used) < 2:
            return front
        coder = _Encoder()
        place_of = np.zeros(size, np.int64)
        place_of[used] = np.arange(len(used))
        coder.put(place_of[indices], frequencies(counts[used]))
        return front + coder.words()

    def decode(self, data: bytes, count: int, size: int) -> Int[np.ndarray, " n"]:
        """The indices, by the histogram in front of them."""
        _check_size(size)
        reader = Reader(data)
        length = reader.number(len(data), "the length of a histogram")
        histogram = Reader(inflated(reader.part(length, "a histogram"), most=10 * (2 * size + 1)))
        number = histogram.number(size, "the number of codes in use")
        gaps = histogram.numbers(number, size, "a gap between codes")
        counts = np.array(histogram.numbers(number, count, "a count"), np.int64)
        used = np.cumsum(np.array(gaps, np.int64) + 1) - 1
        if histogram.left or counts.sum() != count or (number and (counts.min() < 1 or used[-1] >= size)):
            raise UserError("its histogram does not fit the number of tokens")
        if number < 2:
            _check_nothing_left(reader)
            return np.repeat(used, counts)
        words = reader.part(reader.left, "the tokens")
        indices: np.ndarray = used[_Decoder(words).take(count, frequencies(counts))]
        return indices


@final
class AdaptiveCoding(Coding):
    """A model that learns while it codes: each code weighs as often as it was seen, and half a time more.

    Nothing is written but the indices. The counts are brought up to date after each of the first 64 indices, then
    whenever a 32nd part was added, so that a large codebook costs no more time than it must.
    """

    name = "adaptive"
    number = 1

    def encode(self, indices: Int[np.ndarray, " n"], size: int) -> bytes:
        """The indices alone."""
        _check(indices, size)
        if size == 1 or len(indices) == 0:
            return b""
        coder = _Encoder()
        counts = np.zeros(size, np.int64)
        for start, stop in _blocks(len(indices)):
            block = indices[start:stop]
            coder.put(block, frequencies(2 * counts + 1))
            np.add.at(counts, block, 1)
        return coder.words()

    def decode(self, data: bytes, count: int, size: int) -> Int[np.ndarray, " n"]:
        """The indices, learning from them as `encode` did."""
        _check_size(size)
        if size == 1 or count == 0:
            _check_nothing_left(Reader(data))
            return np.zeros(count, np.int64)
        coder = _Decoder(data)
        counts = np.zeros(size, np.int64)
        indices = np.empty(count, np.int64)
        for start, stop in _blocks(count):
            indices[start:stop] = coder.take(stop - start, frequencies(2 * counts + 1))
            np.add.at(counts, indices[start:stop], 1)
        return indices


CODINGS: dict[str, Coding] = {coding.name: coding for coding in (StaticCoding(), AdaptiveCoding())}


@final
class PriorCoding:
    """A model that says at each position how probable the codes are, given the indices before it.

    The decoder must be given the very floats that the coder was given: the same network in the same library, on the
    same kind of machine, with the same shapes. Where a digit differs decoding may go astray, and is then refused, for a
    checksum of the indices is written behind them. Given the same floats nothing depends on how they are rounded.

    Args:
        prior: Takes the indices so far, in order, and gives a probability (or any weight that is not negative) for
            each code of the next one. Those of several codebooks may take turns, each with as many codes as it has.
    """

    def __init__(self, prior: Prior) -> None:
        self.prior = prior

    def encode(self, indices: Int[np.ndarray, " n"]) -> bytes:
        """The indices, then their checksum.

        Raises:
            UserError: An index is beyond the probabilities that the prior gives, these are no probabilities, or
                `constriction` is not installed.
        """
        coder = _Encoder()
        for place in range(len(indices)):
            parts = frequencies_of_floats(self.prior(indices[:place]))
            _check(indices[place : place + 1], len(parts))
            coder.put(indices[place : place + 1], parts)
        return coder.words() + _checksum(indices)

    def decode(self, data: bytes, count: int) -> Int[np.ndarray, " n"]:
        """The indices, as int64.

        Raises:
            UserError: The bytes are damaged, the prior gives other probabilities than it gave to `encode`, or
                `constriction` is not installed.
        """
        words, checksum = data[:-4], data[-4:]
        coder = _Decoder(words)
        indices = np.empty(count, np.int64)
        for place in range(count):
            indices[place] = coder.take(1, frequencies_of_floats(self.prior(indices[:place])))[0]
        if _checksum(indices) != checksum:
            raise UserError("the tokens are damaged, or the prior gives other probabilities than when they were coded")
        return indices


def frequencies(weights: Int[np.ndarray, " codes"]) -> Int[np.ndarray, " codes"]:
    """Whole numbers from 1 that sum to 2^24 and are to one another as weights are, nearly.

    Only whole arithmetic is used, so they are the same on every machine.

    Args:
        weights: Whole numbers, none of them below zero and not all of them zero.
    """
    total = int(weights.sum())
    shift = _HEADROOM - total.bit_length()
    # Sums are rounded, not their parts, so that errors do not add up.
    ends = (np.cumsum(weights) << shift) // -(-(total << shift) >> PRECISION)
    ends[-1] = _WHOLE
    parts = np.diff(ends, prepend=0)
    if parts.min() > 0:
        return parts
    parts = np.maximum(parts, 1)
    above = parts - 1
    above = above * (_WHOLE - len(parts)) // int(above.sum())
    parts = above + 1
    parts[np.argmax(parts)] += _WHOLE - int(parts.sum())
    return parts


def frequencies_of_floats(probabilities: Float[np.ndarray, " codes"]) -> Int[np.ndarray, " codes"]:
    """`frequencies` of weights that are floats; the same floats give the same frequencies on every machine.

    Raises:
        UserError: They are negative, not finite or all zero, or too many.
    """
    values = np.asarray(probabilities, np.float64)
    if values.ndim != 1 or not np.isfinite(values).all() or values.size == 0 or values.min() < 0 or values.max() <= 0:
        raise UserError("a prior must give one finite probability for each code, none below zero and not all zero")
    _check_size(len(values))
    # A quotient and a power of two are exact to the last digit wherever floats are those of IEEE; a sum is not, since
    # its order is free.
    bits = _HEADROOM - 1 - len(values).bit_length()
    return frequencies(np.ldexp(values / values.max(), bits).astype(np.int64))


@final
class _Encoder:
    """constriction's range coder, given whole frequencies."""

    def __init__(self) -> None:
        self._stream = _constriction().stream
        self._coder = self._stream.queue.RangeEncoder()

    def put(self, indices: Int[np.ndarray, " n"], parts: Int[np.ndarray, " codes"]) -> None:
        # Of a single code nothing need be told, and constriction has no model of it.
        if len(parts) > 1:
            self._coder.encode(np.ascontiguousarray(indices, np.int32), _model(self._stream, parts))

    def words(self) -> bytes:
        words: bytes = self._coder.get_compressed().astype("<u4").tobytes()
        return words


@final
class _Decoder:
    """The way back."""

    def __init__(self, words: bytes) -> None:
        if len(words) % 4:
            raise UserError("its tokens are damaged: they end in the middle of a word")
        self._stream = _constriction().stream
        self._coder = self._stream.queue.RangeDecoder(np.frombuffer(words, "<u4").astype(np.uint32))

    def take(self, count: int, parts: Int[np.ndarray, " codes"]) -> Int[np.ndarray, " n"]:
        if len(parts) == 1:
            return np.zeros(count, np.int64)
        try:
            indices: np.ndarray = self._coder.decode(_model(self._stream, parts), count)
        except (AssertionError, ValueError) as error:
            raise UserError(f"its tokens are damaged: {error}") from error
        return indices.astype(np.int64)


def _model(stream: Any, parts: Int[np.ndarray, " codes"]) -> Any:
    # constriction takes floats, scales them to what is left of 2^24 when each code has one part, and cuts the sums
    # off. Given whole numbers that sum to that very rest its factor is 1 and all its sums are exact.
    return stream.model.Categorical((parts - 1).astype(np.float64), perfect=False)


def _constriction() -> Any:
    try:
        import constriction
    except ImportError as error:
        raise UserError(f"coding tokens needs constriction ({error}): pip install 'provq[bitstream]'") from error
    return constriction


def _blocks(count: int) -> Iterator[tuple[int, int]]:
    start = 0
    while start < count:
        stop = min(count, start + max(1, start // 32))
        yield start, stop
        start = stop


def _checksum(indices: Int[np.ndarray, " n"]) -> bytes:
    return zlib.crc32(indices.astype("<i8").tobytes()).to_bytes(4, "little")


def _check(indices: Int[np.ndarray, " n"], size: int) -> None:
    _check_size(size)
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < size:
        wrong = indices[(indices < 0) | (indices >= size)][0]
        raise UserError(f"index {wrong} is out of range: there are {size:,} codes")


def _check_size(size: int) -> None:
    if not 1 <= size <= MOST_CODES:
        raise UserError(f"a codebook of {size:,} codes cannot be coded; at most {MOST_CODES:,} can")


def _check_nothing_left(reader: Reader) -> None:
    if reader.left:
        raise UserError("its tokens are damaged: more was written than so few of them need")
