"""Whole numbers and tables as bytes: small numbers in one, seven bits a byte, the low ones first (LEB128)."""

import zlib
from collections.abc import Iterable
from typing import final

from provq.errors import UserError


def as_bytes(numbers: Iterable[int]) -> bytes:
    """The numbers, none of which is below zero, one after the other."""
    written = bytearray()
    for number in numbers:
        rest = int(number)
        while rest > 0x7F:
            written.append(rest & 0x7F | 0x80)
            rest >>= 7
        written.append(rest)
    return bytes(written)


@final
class Reader:
    """Reads numbers and bytes from the front of what may be damaged or made to do harm.

    Args:
        data: What is read.
        place: Where to begin.
    """

    def __init__(self, data: bytes, place: int = 0) -> None:
        self._data = data
        self.place = place

    @property
    def left(self) -> int:
        """How many bytes were not read yet."""
        return len(self._data) - self.place

    def number(self, most: int, what: str) -> int:
        """The next number.

        Args:
            most: The largest that is accepted.
            what: What it counts, for the error.

        Raises:
            UserError: The data ends before the number does, or it is larger than `most`.
        """
        value, shift = 0, 0
        while True:
            if self.left < 1:
                raise UserError(f"it ends in the middle of {what}")
            byte = self._data[self.place]
            self.place += 1
            value |= (byte & 0x7F) << shift
            if value > most:
                raise UserError(f"{what} is beyond the limit of {most:,}")
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:  # zeros could go on for ever
                raise UserError(f"{what} is longer than any number is")

    def numbers(self, count: int, most: int, what: str) -> list[int]:
        """The next numbers; see `number`."""
        return [self.number(most, what) for _ in range(count)]

    def part(self, length: int, what: str) -> bytes:
        """The next bytes.

        Raises:
            UserError: There are fewer.
        """
        if self.left < length:
            raise UserError(f"it ends in the middle of {what}")
        self.place += length
        return self._data[self.place - length : self.place]


def deflated(data: bytes) -> bytes:
    """The data, smaller where parts of it are alike; without a checksum, which whoever keeps it adds."""
    packer = zlib.compressobj(9, wbits=-15)
    return packer.compress(data) + packer.flush()


def inflated(data: bytes, most: int) -> bytes:
    """What was `deflated`.

    Args:
        data: What `deflated` gave.
        most: How many bytes are accepted, however many the data stands for.

    Raises:
        UserError: The data is damaged, or stands for more.
    """
    unpacker = zlib.decompressobj(wbits=-15)
    try:
        found = unpacker.decompress(data, most)
    except zlib.error as error:
        raise UserError(f"a table in it is damaged: {error}") from error
    if not unpacker.eof or unpacker.unused_data:
        raise UserError(f"a table in it is damaged, or holds more than {most:,} bytes")
    return found
