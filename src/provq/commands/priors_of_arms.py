"""What the tokens of a comparison's runs are worth to a prior: the same one, at one budget, over those of each run.

tokenizer of a run --> store --> prior --> pictures --> distance, likelihood, diversity
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from provq.commands.features import train_features
from provq.commands.generate import generate
from provq.commands.generation import measure_generation
from provq.commands.running import refuse_another_recipe
from provq.commands.train_prior import train_prior
from provq.errors import UsageError, UserError
from provq.evaluation.features import open_network
from provq.evaluation.report import Column
from provq.files import row_from_json, to_json, write_whole
from provq.modalities.image.views import Resize
from provq.recipe import Recipe, build_prior_parts
from provq.tokenizer import Tokenizer
from provq.training.checkpoint import newest_step
from provq.training.log import read_log

MEASURES = (
    Column("prior_bits_per_item", "Prior: bits an item", 1, False, "What the prior needs to name a held-out item."),
    Column("fd", "Fréchet distance", 2, False, "Between generated and held-out pictures."),
    Column("fid", "FID", 2, False, "Between generated and held-out pictures."),
    Column("precision", "Precision", 3, True, "Share of generated pictures that lie among real ones."),
    Column("recall", "Recall", 3, True, "Share of real pictures that lie among generated ones."),
    Column("accuracy", "Accuracy", 3, True, "Share of generated pictures that are of the class asked for."),
    Column("feature_distance", "Feature distance", 2, True, "Between two generated pictures; diversity."),
    Column("pixel_distance", "Pixel distance", 2, True, "Between two generated pictures; diversity."),
)
"""The columns of a comparison with priors; the names of networks stand behind most of these keys in a row."""


@final
@dataclass(frozen=True)
class PriorStudy:
    """The prior that each run of a comparison is given, and how what it draws is measured.

    `recipe` is the prior's, whose table `tokens` only says which views are learned and which classes there are; `train`
    and `held_out` are pictures in the words of `data.train`; `resize` is how they are scaled; `features` holds the
    network that compares them; `number` pictures are drawn.
    """

    recipe: Recipe
    train: str
    held_out: str
    resize: Resize
    features: Path
    number: int


def prior_study(recipe: Recipe, shared: Recipe, *, features: str | Path | None, number: int, out: Path) -> PriorStudy:
    """What follows each run of a comparison.

    Args:
        recipe: That of the prior.
        shared: What the arms share, and with it the data.
        features: The network that measures, as `measure_generation` takes it; left out, a small classifier is trained
            on the training pictures under `out`/features, unless it is there.
        number: How many pictures to draw from each prior.
        out: The folder of the comparison.

    Raises:
        UsageError: `recipe` is that of a tokenizer or wrong, `number` is not positive, or the data are no pictures.
        UserError: The network cannot be read, or the pictures have no classes to train one by.
    """
    data = shared.tables["data"]
    if data.get("kind") != "image":
        raise UsageError(
            f"with_prior: priors are measured by the pictures they draw, data.kind is {data.get('kind')!r}"
        )
    if number < 1:
        raise UsageError(f"samples must be at least 1, got {number}")
    build_prior_parts(recipe)
    train, held_out = _parts_of(data)
    if features is None:
        features = out / "features"
        if not (features / "config.json").is_file():
            try:
                train_features(train, out=features, val=held_out, size=data["size"])
            except UserError as error:
                raise UserError(
                    f"with_prior: no network to measure by can be trained here, give --features: {error}"
                ) from None
    open_network(features)  # what is wrong with it is told before anything is trained
    return PriorStudy(recipe, train, held_out, data.get("resize", "shorter"), Path(features), number)


def numbers_of_prior(folder: Path, seed: int, study: PriorStudy) -> dict[str, Any]:
    """Train the prior on the tokens of a run and measure it, or read what it gave when that is done already.

    Args:
        folder: The run of the tokenizer; the prior's is `prior` in it.
        seed: That of the prior and of what it draws.
        study: Which prior, and how it is measured.

    Returns:
        `prior_bits_per_item`, `prior_bits_per_token` and `prior_seconds`, and what `measure_generation` says of
        generated pictures; nothing for a tokenizer that makes no tokens.

    Raises:
        UsageError: The folder holds another prior.
        UserError: The data cannot be read, or training diverged.
    """
    if not Tokenizer.from_pretrained(folder, local=True).codebook_sizes:
        return {}
    tokens = {"tokenizer": str(folder), "data": study.train, "held_out": study.held_out}
    recipe = study.recipe.with_changes({"tokens": tokens, "training": {"seed": seed}})
    of_prior = folder / "prior"
    drawn = of_prior / f"generated-{study.number}"
    result = drawn / f"{open_network(study.features).label.replace(':', '-')}.json"
    if result.is_file():
        refuse_another_recipe(of_prior, recipe)
        return row_from_json(result.read_text())
    if newest_step(of_prior) == recipe.tables["training"]["steps"]:
        refuse_another_recipe(of_prior, recipe)
    else:
        train_prior(recipe, out=of_prior, resume="auto")
    if not (drawn / "generated.json").is_file():
        shutil.rmtree(drawn, ignore_errors=True)  # what a killed comparison left
        generate(of_prior, number=study.number, out=drawn, seed=seed)
    log = {record["event"]: record for record in read_log(of_prior)}
    measured = measure_generation(str(drawn), study.held_out, study.features, resize=study.resize)
    row = {
        **{f"prior_{name}": log["held_out"][name] for name in ("bits_per_item", "bits_per_token")},
        "prior_seconds": log["train"]["seconds"],
        **{name: number for name, number in measured.items() if name not in ("count", "real_count")},
    }
    write_whole(result, to_json(row).encode())
    return row


def columns_of_priors(rows: list[dict[str, Any]]) -> tuple[Column, ...]:
    """Those of `MEASURES` that rows have, by the names under which they have them."""
    keys = dict.fromkeys(key for row in rows for key in row)
    return tuple(
        replace(measure, key=key, label=measure.label + key.removeprefix(measure.key))
        for measure in MEASURES
        for key in keys
        if key.partition("[")[0].partition("@")[0] == measure.key
    )


def _parts_of(data: Mapping[str, Any]) -> tuple[str, str]:
    """Pictures to train on and held-out ones; embedded data have both under one name."""
    train = str(data["train"])
    if train.startswith("embedded:"):
        whole = train.removesuffix("/train")
        return f"{whole}/train", str(data.get("val") or whole)
    return train, str(data["val"])
