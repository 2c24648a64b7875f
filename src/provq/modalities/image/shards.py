"""WebDataset shards that stream from a network: few of them are needed at a time, in an order known beforehand.

    shards:WHERE[?mix=16&keep=32&cache=FOLDER] --open_shards--> ShardSource

WHERE is a pattern of local tars, a URL with ranges such as `https://host/train-{000..146}.tar`, or the index of such
shards in the form of the library wids. An epoch takes the shards in an order of its own, in groups of `mix`, and
shuffles the samples of each group: what comes at which step is known without a pass over the data, and one group of
shards at a time has to be at hand. `keep` shards that were fetched stay in a folder.
"""

import hashlib
import json
import os
import tarfile
import tempfile
import weakref
from collections import Counter, OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, final
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from provq.data import shuffled_in_groups
from provq.errors import UsageError, UserError, nearest
from provq.files import to_json, write_whole
from provq.modalities.image.pixels import UnreadableImage, read_image
from provq.modalities.image.shard_cache import ShardCache, download, is_remote
from provq.modalities.image.sources import ACCEPTED, ImageSource
from provq.modalities.image.tars import (
    LARGEST_MEMBER,
    MOST_CLASSES,
    PICTURE_SUFFIXES,
    Place,
    class_number,
    is_picture,
    matching_tars,
    members,
    unusable,
    without_braces,
)
from provq.training.log import advancing

OPTIONS = ("mix", "keep", "cache")
MIX = 16
LARGEST_INDEX = 256 * 2**20
_MAKE_AN_INDEX = "`pip install wids`, then `widsindex create SHARDS -o index.json`"
_LOOKS_AHEAD = 16
_NOWHERE = Place(-1, -1)


class Shard(NamedTuple):
    """A tar of samples: its URL or path, and how many samples it holds."""

    place: str
    samples: int


@final
class ShardSource(ImageSource):
    """The samples of shards, each one picture and perhaps a class, known when its shard is opened.

    A sample is what WebDataset calls one: neighbouring members whose names are the same up to the first dot. Its
    picture is the first of them whose name ends as a picture's does. Its class is the number in its `.cls`, else its
    first folder where `classes` has that.
    """

    def __init__(self, shards: Sequence[Shard], classes: tuple[str, ...], *, mix: int, cache: ShardCache) -> None:
        """Put the shards in a row.

        Args:
            shards: Where they are, and how many samples each holds.
            classes: The first folders of all samples, where these are the classes.
            mix: How many shards are shuffled with one another.
            cache: What fetches them.

        Raises:
            UserError: Two have one name.
        """
        super().__init__([], [], classes)
        self._shards = [shard for shard in shards if shard.samples]
        self._names = _short_names([shard.place for shard in self._shards])
        self._class_of = {name: number for number, name in enumerate(classes)}
        self._ends = torch.tensor([shard.samples for shard in self._shards], dtype=torch.int64).cumsum(0)
        self._mix = mix
        self._groups = -(-len(self._shards) // mix)
        self._cache = cache
        # How far ahead it is worth looking: a group, if there is room for it beside the one in use.
        remote = any(is_remote(shard.place) for shard in self._shards)
        self._ahead = int(min(1.0, cache.keep / mix - 1) * len(self) / self._groups) if remote else 0
        self._opened: OrderedDict[int, _Opened] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": OrderedDict()}

    def __len__(self) -> int:
        """How many samples there are, readable or not."""
        return int(self._ends[-1]) if self._shards else 0

    def order(self, seed: int, epoch: int) -> Int[Tensor, " count"]:
        """Groups of shards one after the other, the samples of each group in random order."""
        return shuffled_in_groups(self._ends, self._mix, seed, epoch)

    def expect(self, order: Int[Tensor, " count"], offset: int) -> None:
        """Fetch the shards of the samples that come next, as many of them as can be kept beside those in use."""
        if not self._ahead:
            return
        soon = order[offset : offset + self._ahead : -(-self._ahead // _LOOKS_AHEAD)].contiguous()
        for number in dict.fromkeys(torch.searchsorted(self._ends, soon, right=True).tolist()):
            self._cache.expect(self._shards[number].place)

    def key(self, index: int) -> str:
        """The names of the shard and of the picture in it; the sample's number where it has none."""
        number, sample = self._find(index)
        name = self._open(number).name(sample)
        return f"{self._names[number]}:{name}" if name else f"{self._names[number]}[{sample}]"

    def label(self, index: int) -> int:
        """The sample's class, or -1 where it has none."""
        number, sample = self._find(index)
        opened = self._open(number)
        if opened.numbered(sample):
            return opened.number(sample)
        folder, slash, _ = opened.name(sample).partition("/")
        return self._class_of.get(folder, -1) if slash else -1

    def read(self, index: int) -> Image.Image:
        """The picture of the sample at `index`.

        Raises:
            UnreadableImage: It cannot be read or decoded, or its class is none.
            UserError: Its shard cannot be had, is no tar, or holds more samples than it should.
        """
        number, sample = self._find(index)
        opened = self._open(number)
        picture = read_image(opened.picture(sample))
        if opened.numbered(sample):
            opened.number(sample)
        return picture

    def _find(self, index: int) -> tuple[int, int]:
        """The number of a sample's shard, and its own number in it."""
        number = int(torch.searchsorted(self._ends, index, right=True))
        return number, index - self._start(number)

    def _start(self, number: int) -> int:
        return int(self._ends[number - 1]) if number else 0

    def _open(self, number: int) -> "_Opened":
        if number not in self._opened:
            self._opened[number] = _Opened(self._cache, self._shards[number])
            if len(self._opened) > self._mix:
                self._opened.popitem(last=False)
        self._opened.move_to_end(number)
        return self._opened[number]


@final
class _Opened:
    """An open shard, which stays open until it is forgotten, so that nobody can take it away."""

    def __init__(self, cache: ShardCache, shard: Shard) -> None:
        self._descriptor = cache.open(shard.place)
        weakref.finalize(self, os.close, self._descriptor)
        self._list = _listing(cache, shard.place, self._descriptor)
        found = len(self._list)
        if found != shard.samples:
            cache.forget(shard.place)
        if not found:
            error = self._list.damage or tarfile.ReadError("it holds no samples")
            raise unusable(shard.place, error, "take it out of the list of shards")
        if found > shard.samples:
            raise UserError(
                f"data: the shard {shard.place!r} holds {found} samples and not {shard.samples}; make the index anew "
                f"({_MAKE_AN_INDEX}), or remove the one in {str(cache.folder)!r}"
            )
        self._missing = f"it is missing: its shard holds {found} samples of {shard.samples}"
        if self._list.damage:
            self._missing += f" ({self._list.damage})"

    def name(self, sample: int) -> str:
        """The name of a sample's picture, or of the sample; empty where the shard ended before it."""
        return self._list.names[sample] if sample < len(self._list) else ""

    def picture(self, sample: int) -> bytes:
        if sample >= len(self._list):
            raise UnreadableImage(self._missing)
        place = self._list.picture(sample)
        if place == _NOWHERE:
            raise UnreadableImage(f"there is no picture in this sample; looked for {', '.join(PICTURE_SUFFIXES)}")
        if place.size > LARGEST_MEMBER:
            raise UnreadableImage(f"it holds {place.size} bytes; the limit is {LARGEST_MEMBER}")
        data = self._read(place)
        if len(data) < place.size:
            raise UnreadableImage("its shard ends in the middle of it")
        return data

    def numbered(self, sample: int) -> bool:
        """Whether a class stands beside the picture."""
        return self._list.label(sample) != _NOWHERE

    def number(self, sample: int) -> int:
        place = self._list.label(sample)
        text = self._read(Place(place.offset, min(place.size, 32)))
        number = class_number(text)
        if number is None:
            raise UnreadableImage(f"its class is {text!r}; it must be a whole number from 0 to {MOST_CLASSES - 1}")
        return number

    def _read(self, place: Place) -> bytes:
        try:
            # Without a position of its own in the file: forked processes share the descriptor.
            return os.pread(self._descriptor, place.size, place.offset)
        except OSError as error:
            raise UnreadableImage(f"its shard cannot be read: {error.strerror}") from error


@final
class _Listing:
    """The samples of a tar, as far as it can be read, held in little memory.

    `places` has four numbers for each: offset and size of its picture and of its class, -1 where there is none.
    `damage` is what ended the list too soon.
    """

    def __init__(self, names: list[str], places: list[list[int]], damage: tarfile.TarError | None = None) -> None:
        self.names = names
        self.places = np.array(places, dtype=np.int64).reshape(len(names), 4)
        self.damage = damage

    def __len__(self) -> int:
        return len(self.names)

    def picture(self, sample: int) -> Place:
        return Place(*map(int, self.places[sample, :2]))

    def label(self, sample: int) -> Place:
        return Place(*map(int, self.places[sample, 2:]))


def _listing(cache: ShardCache, place: str, descriptor: int) -> _Listing:
    """The samples of an open shard; its tar is walked through once a machine, and what was found is noted down."""
    status = os.fstat(descriptor)
    stamp = [status.st_size, status.st_mtime_ns]
    note = cache.note(place)
    try:
        with cache.lock(note.name):
            with suppress(FileNotFoundError, ValueError, KeyError, TypeError):
                noted = json.loads(note.read_bytes())
                if noted["stamp"] == stamp:
                    return _Listing(noted["names"], noted["places"])
            found = _walked(descriptor)
            if not found.damage:
                noted = {"stamp": stamp, "names": found.names, "places": found.places.tolist()}
                write_whole(note, json.dumps(noted).encode())
            return found
    except OSError:  # Where nothing can be noted down, it can still be read.
        return _walked(descriptor)


def _walked(descriptor: int) -> _Listing:
    names: list[str] = []
    places: list[list[int]] = []
    last: tuple[str, str] | None = None
    try:
        with open(descriptor, "rb", closefd=False) as file:
            file.seek(0)
            for name, place in members(file):
                folder, _, whole = name.rpartition("/")
                stem, dot, ending = whole.partition(".")
                if not dot:
                    continue
                if (folder, stem) != last:
                    last = (folder, stem)
                    names.append(f"{folder}/{stem}" if folder else stem)
                    places.append([*_NOWHERE, *_NOWHERE])
                if is_picture(name) and places[-1][0] == -1:
                    names[-1] = name
                    places[-1][:2] = place
                elif ending.lower() == "cls":
                    places[-1][2:] = place
    except (tarfile.TarError, OSError) as error:
        damage = error if isinstance(error, tarfile.TarError) else tarfile.ReadError(str(error))
        return _Listing(names, places, damage)
    return _Listing(names, places)


def open_shards(words: str) -> ShardSource:
    """The shards that the words behind `shards:` name.

    Args:
        words: A path or pattern of tars, a URL with `{000..146}` ranges, or the `.json` index of shards; options behind
            a question mark: how many shards to `mix`, how many fetched ones to `keep`, and the `cache` to keep them in.

    Raises:
        UsageError: An option is unknown or out of bounds.
        UserError: There are no such shards, one is damaged, or the index is none.
    """
    where, options = _options(words)
    mix = _number(words, options, "mix", MIX, at_least=1)
    keep = _number(words, options, "keep", 2 * mix, at_least=mix)
    folder = Path(options["cache"]).expanduser() if "cache" in options else _cache_folder()
    cache = ShardCache(folder / hashlib.sha256(where.encode()).hexdigest()[:16], keep)
    if where.partition("?")[0].endswith(".json"):
        shards, classes = _read_index(where)
    elif is_remote(where):
        shards, classes = _counted_once(_urls(where), cache)
    else:
        path = Path(where).expanduser()
        pattern = path / "*.tar" if path.is_dir() else path
        shards, classes = _counted([str(tar) for tar in matching_tars(str(pattern))], cache, "shards counted")
    if not any(shard.samples for shard in shards):
        raise UserError(f"data 'shards:{words}': there are no samples in these {len(shards)} shards")
    return ShardSource(shards, classes, mix=mix, cache=cache)


def _options(words: str) -> tuple[str, dict[str, str]]:
    """What is meant, and how; a question mark may also be part of a pattern or of a URL."""
    where, _, query = words.rpartition("?")
    options = dict(parse_qsl(query, keep_blank_values=True)) if "=" in query else {}
    if not where or (is_remote(where) and not options.keys() & set(OPTIONS)):
        return words, {}
    for option in options:
        if option not in OPTIONS:
            raise UsageError(f"data 'shards:{words}': unknown option {option!r}; {nearest(option, OPTIONS)}")
    return (where, options) if options else (words, {})


def _number(words: str, options: dict[str, str], name: str, default: int, *, at_least: int) -> int:
    text = options.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and int(text) >= at_least):
        why = " (as many as are mixed)" if name == "keep" else ""
        raise UsageError(f"data 'shards:{words}': {name}={text} must be a whole number from {at_least}{why} on")
    return int(text)


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "provq" / "shards"


def _urls(pattern: str) -> list[str]:
    if "*" in pattern:
        raise UsageError(f"data 'shards:{pattern}': a server is not searched; write the numbers as {{000..146}}")
    return without_braces(pattern)


def _read_index(where: str) -> tuple[list[Shard], tuple[str, ...]]:
    try:
        if is_remote(where):
            with tempfile.TemporaryDirectory() as folder:
                download(where, Path(folder) / "index.json")
                return _parsed(where, Path(folder) / "index.json")
        return _parsed(where, Path(where).expanduser())
    except OSError as error:
        raise UserError(f"data 'shards:{where}': the index cannot be read: {error.strerror or error}") from error


def _parsed(where: str, path: Path) -> tuple[list[Shard], tuple[str, ...]]:
    """The shards and classes in an index; `where` is the place that its relative URLs start from."""
    wrong = f"data 'shards:{where}': this is no index of shards"
    if path.stat().st_size > LARGEST_INDEX:
        raise UserError(f"{wrong}: it is larger than {LARGEST_INDEX} bytes")
    try:
        index = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{wrong}: {error}; make one: {_MAKE_AN_INDEX}") from error
    rows = index.get("shardlist") if isinstance(index, dict) else None
    if not isinstance(rows, list):
        raise UserError(f"{wrong}: it has no list 'shardlist'; make one: {_MAKE_AN_INDEX}")
    shards = []
    for row in rows:
        url, samples = (row.get("url"), row.get("nsamples")) if isinstance(row, dict) else (None, None)
        if not isinstance(url, str) or type(samples) is not int or samples < 0:
            raise UserError(f"{wrong}: {str(row)[:200]} has no 'url' or no 'nsamples'; make one: {_MAKE_AN_INDEX}")
        place = _beside(where, url)
        if not is_remote(place) and not Path(place).is_file():
            raise UserError(f"data 'shards:{where}': the shard {place!r} is not there")
        shards.append(Shard(place, samples))
    classes = index.get("classes", [])
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise UserError(f"{wrong}: its 'classes' are no list of names")
    return shards, tuple(classes)


def _beside(index: str, url: str) -> str:
    """A shard's place, relative to that of its index; one that was fetched may not point into this machine."""
    if is_remote(index) and (url.startswith(("/", "file:", "local:")) or "::" in url):
        raise UserError(f"data 'shards:{index}': it points at {url!r}; a shard must lie beside it or have a URL")
    if is_remote(url):
        return url
    if is_remote(index):
        return f"{index.partition('?')[0].rpartition('/')[0]}/{url}"
    return str(Path(index).expanduser().parent / url)


def _counted_once(urls: Sequence[str], cache: ShardCache) -> tuple[list[Shard], tuple[str, ...]]:
    """Shards whose samples were counted by this or an earlier process on this machine."""
    path = cache.folder / "index.json"
    with cache.lock("index"):
        if not path.is_file():
            shards, classes = _counted(urls, cache, "shards fetched to count their samples (an index would save that)")
            rows = [{"url": shard.place, "nsamples": shard.samples} for shard in shards]
            index = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "shardlist": rows, "classes": list(classes)}
            write_whole(path, to_json(index).encode())
    return _read_index(str(path))


def _counted(places: Sequence[str], cache: ShardCache, title: str) -> tuple[list[Shard], tuple[str, ...]]:
    """Shards with the number of their samples, and the classes if folders are classes, from the tars themselves."""
    shards = []
    folders: set[str] = set()
    has_labels = has_pictures = False
    for place in advancing(places, len(places), title):
        with open(cache.open(place), "rb") as file:
            found = _listing(cache, place, file.fileno())
        if found.damage:
            cache.forget(place)
            raise unusable(place, found.damage, ACCEPTED)
        shards.append(Shard(place, len(found)))
        folders.update(name.split("/")[0] for name in found.names if "/" in name)
        has_pictures |= bool((found.places[:, 0] >= 0).any())
        has_labels |= bool((found.places[:, 2] >= 0).any())
    if not has_pictures:
        raise UserError(
            f"data 'shards:{places[0]}' and {len(places) - 1} more: there are no pictures; "
            f"looked for members that end in {', '.join(PICTURE_SUFFIXES)}"
        )
    return shards, () if has_labels else tuple(sorted(folders))


def _short_names(places: Sequence[str]) -> list[str]:
    """The shards' places below the deepest folder that holds them all, without what URLs carry beside a path."""
    paths = []
    for place in places:
        url = urlsplit(place)
        paths.append((url.netloc + url.path if is_remote(place) else place).split("/"))
    common = len(os.path.commonprefix([path[:-1] for path in paths]))
    names = ["/".join(path[common:]) for path in paths]
    (name, times), *_ = Counter(names).most_common(1)
    if times > 1:
        raise UserError(f"data: {times} shards are called {name!r}; list each shard once")
    return names
