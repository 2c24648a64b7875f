"""New pictures out of a prior."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from provq.commands.running import joined
from provq.errors import UsageError, UserError, nearest
from provq.evaluation.samples import write_samples
from provq.files import to_json, write_whole
from provq.generation import Prior, Sampling, labels_per_class, sample
from provq.generation.pair import Pair, load_pair
from provq.modalities.files import Places
from provq.modalities.image.pixels import contact_sheet, read_image, to_image, to_png
from provq.ops.modes import evaluating
from provq.spec import fitting
from provq.training.log import paced

_ROWS, _COLUMNS = 10, 10  # of the sheet


class Generated(NamedTuple):
    """What `generate` wrote: a file a picture in the order of their numbers, their classes (-1: none), and two of all.

    `sheet` shows some of them side by side; `samples` holds all of them as ADM's evaluator reads them.
    """

    pictures: list[Path]
    labels: Int[Tensor, " number"]
    sheet: Path
    samples: Path


def generate(
    prior: Pair | str | Path,
    *,
    number: int,
    out: str | Path,
    classes: Sequence[str] = (),
    per_class: bool = False,
    seed: int = 0,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    guidance: float | None = None,
    steps: int | None = None,
    batch_size: int = 64,
) -> Generated:
    """Draw pictures and write them into a folder.

    The same seed gives the same pictures, however many processes share the work: started by torchrun, they take turns
    with batches. Another size of batches or another machine may round otherwise (see `provq.generation.sample`).

    Args:
        prior: The prior with its tokenizer, or where both are saved: the folder of a run or of a checkpoint.
        number: How many pictures, spread evenly over the classes.
        out: The folder: `pictures/CLASS/NUMBER.png`, `sheet.png`, `samples.npz` for ADM's evaluator, and
            `generated.json`, which says how they were drawn.
        classes: Their classes, each by its name or its number; all of them by default.
        per_class: Whether `number` pictures are drawn of each class.
        seed: Any whole number.
        temperature: What logits are divided by; this and the next four are as the prior's recipe says where left out.
        top_k: Only so many of the likeliest codes can be drawn; 0 is all.
        top_p: Only the likeliest codes that together reach this probability can be drawn; 1 is all.
        guidance: The scale of classifier-free guidance; 1 is none.
        steps: In how many passes a masked prior fills an item.
        batch_size: How many items are drawn side by side.

    Raises:
        UsageError: An argument is out of bounds, a class is unknown, or `out` holds pictures already.
        UserError: There is no prior, or it does not draw pictures.
    """
    for name, value in (("number", number), ("batch_size", batch_size)):
        if value < 1:
            raise UsageError(f"generate: {name} must be at least 1, got {value}")
    out = Path(out)
    pair = prior if isinstance(prior, Pair) else load_pair(prior)
    if pair.tokenizer.metadata.get("data", {}).get("kind", "image") != "image":
        raise UserError("generate: this prior draws no pictures; provq.generation.sample draws its tokens")
    labels = _labels(pair.prior, classes, number, per_class)
    changes = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance": guidance, "steps": steps}
    sampling = _sampling(pair.prior, {name: value for name, value in changes.items() if value is not None})
    if guidance not in (None, 1) and not pair.prior.classes:
        raise UsageError(f"generate: guidance={guidance:g} is for priors that know classes, and this one knows none")
    fabric = joined()
    if fabric.is_global_zero and (out / "pictures").exists():
        raise UsageError(f"{out} holds pictures already; choose another --out")
    fabric.barrier()
    pair.prior.to(fabric.device)
    pair.tokenizer.to(fabric.device)
    places = _places(pair.prior, labels, out / "pictures")
    own = _of_rank(len(labels), batch_size, fabric.global_rank, fabric.world_size)
    drawn = sample(pair.prior, labels[own], sampling, seed=seed, batch_size=batch_size, numbers=own)
    with paced("generate", len(own)) as advance, evaluating(pair.tokenizer):
        done = 0
        for tokens in drawn:
            for picture in pair.tokenizer.decode(tokens):
                write_whole(places[own[done]], to_png(to_image(picture)))
                done += 1
            advance(len(tokens))
    fabric.barrier()
    made = Generated(places, labels, out / "sheet.png", out / "samples.npz")
    if fabric.is_global_zero:
        facts = {"seed": seed, "sampling": asdict(sampling), "tokenizer": pair.prior.metadata.get("tokenizer")}
        _write_all(made, out / "generated.json", {"number": len(labels), "batch_size": batch_size, **facts})
    fabric.barrier()
    return made


def _labels(prior: Prior, classes: Sequence[str], number: int, per_class: bool) -> Int[Tensor, " number"]:
    """The class of each picture."""
    if not prior.classes:
        if classes or per_class:
            raise UsageError("generate: this prior knows no classes; leave --class and --per-class out")
        return torch.full((number,), -1)
    names = _names(prior)
    wanted = [_class(name, names) for name in classes] or list(range(prior.classes))
    return labels_per_class(wanted, number * len(wanted) if per_class else number)


def _names(prior: Prior) -> list[str]:
    names = prior.metadata.get("classes", [])
    return list(map(str, names)) if len(names) == prior.classes else list(map(str, range(prior.classes)))


def _class(name: str, names: Sequence[str]) -> int:
    """The label of a class that is given by its name, or else by its number."""
    if name in names:
        return names.index(name)
    if name.isdecimal() and int(name) < len(names):
        return int(name)
    numbered = f"they are also numbered, 0 to {len(names) - 1}"
    raise UsageError(f"generate: unknown class {name!r} ({numbered}); {nearest(name, names)}")


def _sampling(prior: Prior, changes: dict[str, float]) -> Sampling:
    own = prior.metadata.get("sampling", {})
    return Sampling(**fitting(Sampling, {**own, **changes}, where="sampling"))


def _of_rank(number: int, batch_size: int, rank: int, ranks: int) -> list[int]:
    """The numbers of the items that a process draws: whole batches in turn, so that batches do not depend on it."""
    return [item for item in range(number) if item // batch_size % ranks == rank]


def _places(prior: Prior, labels: Int[Tensor, " number"], folder: Path) -> list[Path]:
    """A file for each picture, in a folder of its class where it has one; names of classes may be anybody's."""
    places, names = Places(folder, ".png"), _names(prior)
    parents = [f"{names[label]}/" if label >= 0 else "" for label in labels.tolist()]
    return [places.of(f"{parent}{number:06d}") for number, parent in enumerate(parents)]


def _write_all(made: Generated, path: Path, facts: dict[str, object]) -> None:
    classes = made.labels if int(made.labels.min()) >= 0 else None
    write_samples(made.samples, _read(made.pictures), len(made.pictures), classes)
    rows = [[read_image(place.read_bytes()) for place in row] for row in _on_sheet(made.pictures, made.labels.tolist())]
    write_whole(made.sheet, to_png(contact_sheet(rows)))
    write_whole(path, to_json(facts).encode())


def _read(places: Sequence[Path]) -> Iterator[UInt8[Tensor, "1 3 h w"]]:
    for place in places:
        picture = read_image(place.read_bytes())
        values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
        yield values.reshape(1, picture.height, picture.width, 3).permute(0, 3, 1, 2)


def _on_sheet(places: Sequence[Path], labels: Sequence[int]) -> list[list[Path]]:
    """Some of the pictures in rows; where there are classes a row has one of them."""
    if min(labels) < 0:
        shown = places[: _ROWS * _COLUMNS]
        return [list(shown[first : first + _COLUMNS]) for first in range(0, len(shown), _COLUMNS)]
    by_class: dict[int, list[Path]] = {}
    for place, label in zip(places, labels, strict=True):
        by_class.setdefault(label, []).append(place)
    return [of_class[:_COLUMNS] for _, of_class in sorted(by_class.items())[:_ROWS]]
