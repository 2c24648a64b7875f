"""Uncompressed tars: which ones a pattern names, where in them each file lies, and its bytes.

Nothing is unpacked, and the name of a member is a name only, never a path.
"""

import glob
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from textwrap import shorten
from typing import BinaryIO, NamedTuple

from provq.errors import UsageError, UserError, nearest

PICTURE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2"),
)

# Limits that no honest tar comes near.
LARGEST_MEMBER = 256 * 2**20
MOST_MEMBERS = 20_000_000
MOST_CLASSES = 1_000_000


class Place(NamedTuple):
    """Where the bytes of a file lie in a tar."""

    offset: int
    size: int


def is_picture(name: str) -> bool:
    """Whether a file of this name should hold a picture; hidden ones do not count."""
    path = PurePosixPath(name)
    return path.suffix.lower() in PICTURE_SUFFIXES and not path.name.startswith(".")


def members(file: BinaryIO) -> Iterator[tuple[str, Place]]:
    """The name and the place of each regular file in an open tar, in order.

    Raises:
        tarfile.TarError: It is compressed, damaged or truncated, or no tar at all, found out when the end of what can
            be read is reached; or it has too many members.
    """
    _refuse_compressed(file)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for count, member in enumerate(tar, start=1):
                if count > MOST_MEMBERS or member.size < 0:
                    raise tarfile.ReadError("too many members, or one of negative size")
                if member.isreg() and not member.issparse():
                    yield PurePosixPath(member.name).as_posix(), Place(member.offset_data, member.size)
                tar.members.clear()  # type: ignore[attr-defined]  # It would remember every header.
            # The standard library takes garbage, or a cut where a header should be, for the end of the tar.
            file.seek(tar.offset)
    except OverflowError as error:
        raise tarfile.ReadError(str(error)) from error
    if file.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError("its end is missing")


def _refuse_compressed(file: BinaryIO) -> None:
    start = file.read(6)
    file.seek(0)
    tools = (
        (b"\x1f\x8b", "gunzip"),
        (b"BZh", "bunzip2"),
        (b"\xfd7zXZ", "unxz"),
        (b"\x28\xb5\x2f\xfd", "unzstd"),
    )
    for magic, tool in tools:
        if start.startswith(magic):
            raise tarfile.CompressionError(
                "the file is compressed, so its pictures cannot be reached one by one; "
                f"decompress it with `{tool}` and give the .tar file"
            )


def unusable(tar: str, error: tarfile.TarError, instead: str) -> UserError:
    """What to tell a user about a tar that `members` refused, with what to give instead."""
    if isinstance(error, tarfile.CompressionError):
        return UserError(f"data {tar!r}: {error}")
    return UserError(
        f"data {tar!r}: the file is no tar, or is damaged or truncated ({error}); copy or make it anew, or {instead}"
    )


def class_number(text: bytes) -> int | None:
    """The class in the content of a `.cls` file; None where it is no whole number from 0 to MOST_CLASSES - 1."""
    digits = text.decode("ascii", errors="replace").strip()
    if not re.fullmatch("[0-9]{1,9}", digits) or int(digits) >= MOST_CLASSES:
        return None
    return int(digits)


def matching_tars(pattern: str) -> list[Path]:
    """The tars that a pattern names; each part of a `{a..b}` range or an `{a,b}` list must match.

    Raises:
        UsageError: A range is empty.
        UserError: A part matches nothing, or something that is no tar.
    """
    found: set[Path] = set()
    for part in without_braces(pattern):
        matches = [Path(match) for match in glob.glob(part, recursive=True)]
        if not matches:
            raise UserError(f"data {pattern!r}: nothing matches {part!r}; {what_lies_near(Path(part))}")
        found.update(matches)
    for path in sorted(found):
        if path.suffix.lower() != ".tar":
            raise UserError(
                f"data {pattern!r}: a pattern may match only .tar files, but it matches {str(path)!r}; "
                f"for the pictures of a folder give the folder {str(path.parent)!r}"
            )
    return sorted(found)


def without_braces(pattern: str) -> list[str]:
    """Each choice of the `{a..b}` ranges and `{a,b}` lists in a pattern.

    Raises:
        UsageError: A range is empty.
    """
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]+))\}", pattern)
    if match is None:
        return [pattern]
    first, last, words = match.groups()
    if words:
        choices = words.split(",")
    else:
        choices = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    if not choices:
        raise UsageError(f"data {pattern!r}: the range {match[0]} is empty; write {{{last}..{first}}}")
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [whole for choice in choices for whole in without_braces(before + choice + after)]


def what_lies_near(path: Path) -> str:
    """The end of a sentence on a missing path: the nearest name where the path leaves what exists."""
    while not path.parent.is_dir():
        path = path.parent
    folder = str(path.parent)
    names = [name for name in os.listdir(folder) if not name.startswith(".")]
    if not names:
        return f"the folder {folder!r} is empty"
    return shorten(f"in the folder {folder!r}: {nearest(path.name, names)}", 240, placeholder=" ...")
