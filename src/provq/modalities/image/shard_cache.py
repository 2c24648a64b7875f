"""Shards at hand: local ones where they lie, all others fetched whole, once per machine, into a folder.

Any number of processes may share the folder. A shard appears in it by one move and vanishes when it was used longest
ago and room is needed; whoever has it open then reads on, and whoever wants it again fetches it again.
"""

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import final

import aiohttp
from filelock import FileLock, Timeout
from fsspec.core import url_to_fs

from provq.errors import UserError
from provq.files import appearing

# Seconds to wait before each further try.
PAUSES = (1.0, 4.0, 16.0)
_AT_A_TIME = 2
# Left to itself the library gives up on whatever takes more than five minutes, as a large shard may.
_HTTP = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)}}


def is_remote(place: str) -> bool:
    """Whether a place is a URL rather than a path."""
    return "://" in place


@final
class ShardCache:
    """The folder of fetched shards, of which there are never more than a number, those being fetched included.

    Args:
        folder: Where they lie.
        keep: How many there may be; more only while more than that are fetched at one time.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self._threads: list[Thread] = []
        self._failed: set[str] = set()  # places that could not be had ahead of their turn

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_threads": []}

    def open(self, place: str) -> int:
        """The descriptor of an open shard, for its caller to close.

        Args:
            place: Its URL or path.

        Raises:
            UserError: It is not there, or cannot be fetched.
        """
        try:
            if not is_remote(place):
                return os.open(place, os.O_RDONLY)
            while True:
                # It may be dropped between any two of these lines; once it is open that is no matter.
                with suppress(FileNotFoundError):
                    return _touched(self._path(place))
                with self.lock(self._path(place).name):
                    self._fetch(place)
        except OSError as error:
            raise UserError(f"data: the shard {place!r} cannot be read: {error.strerror or error}") from error

    def expect(self, place: str) -> None:
        """Fetch a shard in the background, unless it is at hand or enough are being fetched."""
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        if not is_remote(place) or place in self._failed or len(self._threads) >= _AT_A_TIME:
            return
        path = self._path(place)
        if not (path.exists() or _unfinished(path).exists()):
            # It ends with its process: what it leaves half done the next one to fetch this shard or another removes.
            thread = Thread(target=self._fetch_ahead, args=(place,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def forget(self, place: str) -> None:
        """Keep a shard no longer, for it is not what it should be, and may be when it is fetched again."""
        if is_remote(place):
            self._path(place).unlink(missing_ok=True)
            self.note(place).unlink(missing_ok=True)

    def note(self, place: str) -> Path:
        """Where to note down what is in a shard; a fetched one and its note vanish together."""
        return self._path(place).with_suffix(".json")

    def lock(self, name: str, *, wait: bool = True) -> FileLock:
        """What only one process at a time may hold."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / f".{name}.lock", blocking=wait)

    def _path(self, place: str) -> Path:
        return self.folder / f"{hashlib.sha256(place.encode()).hexdigest()[:24]}.tar"

    def _fetch_ahead(self, place: str) -> None:
        # If another process is at it, or it fails, whoever needs the shard will wait for it, or try again and tell.
        try:
            with suppress(Timeout), self.lock(self._path(place).name, wait=False):
                self._fetch(place)
        except (UserError, OSError):
            self._failed.add(place)

    def _fetch(self, place: str) -> None:
        path = self._path(place)
        if path.exists():
            return
        with appearing(path) as unfinished:
            unfinished.unlink(missing_ok=True)  # of a process that was killed
            with self.lock("room"):
                self._make_room()
                unfinished.touch()
            download(place, unfinished)

    def _make_room(self) -> None:
        """Drop what was used longest ago, and what killed processes left half done, until one more shard fits."""
        under_way = 0
        for unfinished in self.folder.glob(_unfinished(Path("*.tar")).name):
            try:
                with self.lock(unfinished.name.removeprefix(".unfinished-"), wait=False):
                    unfinished.unlink(missing_ok=True)
            except Timeout:
                under_way += 1
        whole = sorted(self.folder.glob("[!.]*.tar"), key=_last_used)
        for path in whole[: max(0, len(whole) + under_way + 1 - self.keep)]:
            path.unlink(missing_ok=True)
            path.with_suffix(".json").unlink(missing_ok=True)


def download(place: str, to: Path) -> None:
    """Write what lies at a URL to a file.

    Raises:
        UserError: It is not there, or cannot be had after several tries, or a library that is needed is not installed.
    """
    failure = f"data: {place!r} cannot be had"
    try:
        system, path = url_to_fs(place, **(_HTTP if place.startswith(("http://", "https://")) else {}))
    except (ImportError, ValueError) as error:
        raise UserError(f"{failure}: {error}") from error
    for pause in (*PAUSES, None):
        try:
            system.get_file(path, str(to))
            return
        except FileNotFoundError as error:
            raise UserError(f"{failure}: there is no such file") from error
        # The library raises whatever its parts raise: errors of the network, of servers, of credentials.
        except Exception as error:
            if pause is None:
                words = " ".join(str(error).split()) or type(error).__name__
                raise UserError(f"{failure}, tried {len(PAUSES) + 1} times: {words}") from error
            time.sleep(pause)


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_atime
    except FileNotFoundError:  # Somebody else tidies up, too.
        return 0.0


def _touched(path: Path) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    with suppress(PermissionError):  # Another user of a shared folder may have fetched it.
        # When it was fetched stays as it is: that tells it from another one in its place.
        os.utime(descriptor, ns=(time.time_ns(), os.fstat(descriptor).st_mtime_ns))
    return descriptor


def _unfinished(path: Path) -> Path:
    """Where `files.appearing` has the file before it is whole."""
    return path.with_name(f".unfinished-{path.name}")
