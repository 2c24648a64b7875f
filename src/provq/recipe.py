"""A recipe: one YAML file that says everything about a run; the only file that sees every table.

    data, encoder, quantizer, decoder, objective, training        of a tokenizer, in the order in which data flows
    tokens, prior, sampling, training                             of a prior over its tokens

`extends:` names another recipe to start from, so that an ablation is a file of one to three lines.
"""

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from provq.errors import UsageError, UserError, nearest

if TYPE_CHECKING:  # torch takes seconds to import, and listing recipes needs none of it
    from provq.curriculum import Schedule
    from provq.generation import Prior, Sampling
    from provq.generation.tokens import Shape, TokensOfPrior
    from provq.modalities.base import Modality
    from provq.tokenizer import Tokenizer
    from provq.training.adversary import Adversary
    from provq.training.objective import Objective
    from provq.training.settings import Training

TABLES = ("data", "encoder", "quantizer", "decoder", "objective", "training")
PRIOR_TABLES = ("tokens", "prior", "sampling", "training")
_OPTIONAL = ("sampling",)
# Keys of `training` that speak of codes and hardness.
_OF_TOKENIZERS = frozenset(
    {
        "codebook_learning_rate",
        "curriculum",
        "hand_overs",
        "latents_per_code",
        "revive_until",
        "start_from",
        "tokens_harden",
    }
)
_SHIPPED = files("provq") / "recipes"
_DEEPEST = 20  # recipes that extend one another


@dataclass(frozen=True)
class Recipe:
    """A recipe whose `extends` and overrides are resolved; `tables` are plain values."""

    name: str
    tables: Mapping[str, Mapping[str, Any]]

    def with_changes(self, changes: Mapping[str, Any]) -> "Recipe":
        """This recipe with some keys changed; of a table of another `kind` only the keys it says to `keep` remain.

        Raises:
            UsageError: There is no table of that name.
        """
        _check_tables(self.name, changes, self._known)
        return Recipe(self.name, _merged(self.tables, changes))

    @property
    def is_of_prior(self) -> bool:
        """Whether it describes a prior, and not a tokenizer."""
        return self._known is PRIOR_TABLES

    @property
    def _known(self) -> tuple[str, ...]:
        return _known_tables(self.tables)

    def to_yaml(self) -> str:
        """The resolved recipe as a file that `load` reads."""
        return yaml.safe_dump(_plain(self.tables), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-3 is a number, as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


class Parts(NamedTuple):
    """The objects that a recipe describes; the tokenizer's weights are fresh."""

    modality: "Modality"
    tokenizer: "Tokenizer"
    objective: "Objective"
    adversary: "Adversary | None"
    training: "Training"
    schedule: "Schedule"


class PriorParts(NamedTuple):
    """What a recipe of a prior says, but for the prior itself, which depends on the shape of its tokens."""

    tokens: "TokensOfPrior"
    training: "Training"
    sampling: "Sampling"


def build_parts(recipe: Recipe) -> Parts:
    """Make what a recipe of a tokenizer describes, with weights drawn from its seed; no data is opened.

    Raises:
        UsageError: A table names an unknown kind, or holds a wrong key or value, and the place is named; or the recipe
            is one of a prior.
    """
    if recipe.is_of_prior:
        raise UsageError(f"{recipe.name} is the recipe of a prior, and one of a tokenizer is wanted; {_kinds_hint()}")
    import torch

    from provq import modalities
    from provq.curriculum import kinds
    from provq.modalities.protein.objective import StructureObjective
    from provq.spec import build, describe, fitting
    from provq.tokenizer import Tokenizer
    from provq.training.objective import LikenessObjective, Objective
    from provq.training.settings import Training

    objectives: dict[str, type[Objective]] = {"likeness": LikenessObjective, "structure": StructureObjective}
    tables = recipe.tables
    training_table = dict(tables["training"])
    curriculum = training_table.pop("curriculum", {"kind": "cosine"})
    schedule = build(curriculum, kinds.KINDS, where="training.curriculum", local=True)
    training = Training(**fitting(Training, training_table, where="training"))
    objective_table = {"kind": "likeness", **tables["objective"]}
    adversary_table = objective_table.pop("adversary", None)
    objective = build(objective_table, objectives, where="objective", local=True)
    modality = build(tables["data"], modalities.KINDS, where="data", local=True)
    torch.manual_seed(training.seed)
    metadata = {"data": describe(modality, modalities.KINDS)}
    tokenizer = Tokenizer.from_config({**tables, "metadata": metadata}, local=True)
    _check_shapes(tokenizer, modality)
    objective.check(tokenizer)
    adversary = None if adversary_table is None else _adversary(adversary_table, modality, schedule, training)
    return Parts(modality, tokenizer, objective, adversary, training, schedule)


def build_prior_parts(recipe: Recipe) -> PriorParts:
    """Make what a recipe of a prior says, but for the prior; no data is opened.

    Raises:
        UsageError: A table holds a wrong key or value, and the place is named; or the recipe is one of a tokenizer.
    """
    from provq.generation import Sampling
    from provq.generation.tokens import TokensOfPrior
    from provq.spec import fitting
    from provq.training.settings import Training

    if not recipe.is_of_prior:
        raise UsageError(f"{recipe.name} is the recipe of a tokenizer, and one of a prior is wanted; {_kinds_hint()}")
    tables = recipe.tables
    for key in tables["training"]:
        if key in _OF_TOKENIZERS:
            raise UsageError(f"training.{key}: it is for tokenizers, and this is the recipe of a prior; leave it out")
    return PriorParts(
        TokensOfPrior(**fitting(TokensOfPrior, tables["tokens"], where="tokens")),
        Training(**fitting(Training, tables["training"], where="training")),
        Sampling(**fitting(Sampling, tables.get("sampling", {}), where="sampling")),
    )


def build_prior(recipe: Recipe, shape: "Shape") -> "Prior":
    """Make the prior that a recipe describes, for tokens of a shape, with weights drawn from its seed.

    Raises:
        UsageError: A table holds a wrong key or value, and the place is named; or the recipe is one of a tokenizer.
    """
    import torch

    from provq.generation import KINDS
    from provq.spec import build

    parts = build_prior_parts(recipe)
    torch.manual_seed(parts.training.seed)
    return build(
        recipe.tables["prior"],
        KINDS,
        where="prior",
        local=True,
        codebook_sizes=shape.codebook_sizes,
        positions=shape.positions,
        classes=len(parts.tokens.class_names),
        ragged=shape.ragged,
    )


def _adversary(table: object, modality: "Modality", schedule: "Schedule", training: "Training") -> "Adversary":
    """The adversary, told what its discriminator is to judge."""
    from provq.networks.discriminators import DISCRIMINATORS
    from provq.spec import build, fitting
    from provq.training.adversary import Adversary

    if not isinstance(table, Mapping):
        raise UsageError(f"objective.adversary: expected a mapping, got {table!r}")
    arguments = dict(table)
    _, channels, *_, size = modality.blank_item().shape
    where = "objective.adversary"
    discriminator = build(
        arguments.pop("discriminator", {"kind": "patch"}),
        DISCRIMINATORS,
        where=f"{where}.discriminator",
        local=True,
        channels=channels,
        size=size,
    )
    adversary = Adversary(**fitting(Adversary, arguments, where=where, given={"discriminator": discriminator}))
    if adversary.start is None and schedule(1 - adversary.warmup - 1 / training.steps) < 1:
        raise UsageError(
            f"{where}: by default the discriminator begins when hardness is 1, which is too late for the tokenizer to "
            f"see it; end the anneal earlier (training.curriculum.end), or set {where}.start"
        )
    if training.precision == "16-mixed":
        # Its own optimizer knows nothing of the scale of the loss.
        raise UsageError(f"{where}: needs training.precision: bf16-mixed or 32-true, got 16-mixed")
    if adversary.adaptive and training.precision != "32-true":
        raise UsageError(f"{where}.adaptive: needs training.precision: 32-true, got {training.precision}")
    if adversary.adaptive and training.strategy == "fsdp":
        raise UsageError(f"{where}.adaptive: needs training.strategy: ddp, for the whole last layer of the decoder")
    return adversary


def _check_shapes(tokenizer: "Tokenizer", modality: "Modality") -> None:
    """See to it that an item of the data comes out of the networks in the shape in which it goes in."""
    from torch.nn import Sequential

    from provq.evaluation.cost import shape_of_output

    item = modality.blank_item()
    try:
        shape = shape_of_output(Sequential(tokenizer.encoder, tokenizer.decoder), item)
    except RuntimeError as error:
        raise UsageError(
            f"encoder, decoder: they do not fit items of shape {tuple(item.shape[1:])}: {error}"
        ) from error
    if shape != item.shape:
        raise UsageError(
            f"encoder, decoder: items of shape {tuple(item.shape[1:])} come out as {tuple(shape[1:])}; "
            f"both must have one downsampling, and data.size be a multiple of it, here of {tokenizer.encoder.reduction}"
        )


def load(source: str | Path | Mapping[str, Any] | Recipe, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        source: A shipped name such as `image/tiny64`, a YAML file, the mapping itself, or a recipe to change.
        overrides: `key=value` with dots between keys, such as `training.steps=200`; values are YAML.

    Raises:
        UsageError: There is no such recipe, it is no valid YAML, or it holds an unknown table.
    """
    name, tables = _read(source)
    for override in overrides:
        tables = _merged(tables, _parsed(override))
    known = _known_tables(tables)
    _check_tables(name, tables, known)
    for table in known:
        if table not in tables and table not in _OPTIONAL:
            raise UsageError(f"{name}: the table {table!r} is missing; a recipe has {', '.join(known)}")
    return Recipe(name, _plain({table: tables[table] for table in known if table in tables}))


def load_changes(source: str | Path) -> dict[str, Any]:
    """Read an arm of a comparison: a part of a recipe that is laid over another one.

    Raises:
        UsageError: There is no such arm, or it is no valid YAML.
    """
    return _parsed_file(_located(str(source), folder="arms"), str(source))


def shipped(folder: str = "") -> list[str]:
    """The names of the recipes that come with provq, or with folder="arms" of the arms of comparisons."""
    root = Path(str(_SHIPPED))
    names = sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml"))
    if folder:
        return [name.removeprefix(f"{folder}/") for name in names if name.startswith(f"{folder}/")]
    return [name for name in names if not name.startswith("arms/")]


def text_of(source: str) -> str:
    """The file of a shipped or local recipe, word by word.

    Raises:
        UsageError: There is no such recipe.
    """
    return _located(source).read_text()


def header_of(source: str) -> str:
    """The first line of a recipe's opening comment."""
    return _first_comment(_located(source))


def header_of_arm(source: str) -> str:
    """The first line of an arm's opening comment."""
    return _first_comment(_located(source, folder="arms"))


def _first_comment(path: Path) -> str:
    first = path.read_text().partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def _known_tables(tables: Mapping[str, Any]) -> tuple[str, ...]:
    """The tables that a recipe with these ones may have."""
    return PRIOR_TABLES if "prior" in tables or "tokens" in tables else TABLES


def _kinds_hint() -> str:
    return f"a recipe of a tokenizer has the tables {', '.join(TABLES)}, one of a prior {', '.join(PRIOR_TABLES)}"


def _check_tables(name: str, tables: Mapping[str, Any], known: Sequence[str]) -> None:
    for table, content in tables.items():
        if table not in known:
            raise UsageError(f"{name}: unknown table {table!r}; {nearest(str(table), known)}")
        if not isinstance(content, Mapping):
            raise UsageError(f"{name}: the table {table!r} must be a mapping, got {content!r}")


def _read(source: str | Path | Mapping[str, Any] | Recipe, depth: int = 0) -> tuple[str, dict[str, Any]]:
    if depth > _DEEPEST:
        raise UsageError(f"{source}: `extends` leads in a circle")
    if isinstance(source, Recipe):
        return source.name, dict(source.tables)
    if isinstance(source, Mapping):
        name, tables = "recipe", copy.deepcopy(dict(source))
    else:
        name, tables = str(source), _parsed_file(_located(str(source)), str(source))
    parent = tables.pop("extends", None)
    if parent is None:
        return name, tables
    beside = Path(str(source)).parent / f"{parent}" if not isinstance(source, Mapping) else None
    below = _read(beside if beside is not None and beside.is_file() else str(parent), depth + 1)[1]
    return name, _merged(below, tables)


def _located(source: str, folder: str = "") -> Path:
    path = Path(source)
    if path.is_file():
        return path
    shipped_path = Path(str(_SHIPPED)) / folder / f"{source}.yaml"
    # A name may not climb out of the folder of recipes.
    if ".." not in path.parts and not path.is_absolute() and shipped_path.is_file():
        return shipped_path
    what = "arm" if folder else "recipe"
    raise UsageError(f"no {what} {source!r}: neither a file nor shipped; {nearest(source, shipped(folder))}")


def _parsed_file(path: Path, name: str) -> dict[str, Any]:
    try:
        parsed = yaml.load(path.read_text(), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{name}: not valid YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error}") from error
    if not isinstance(parsed, Mapping):
        raise UsageError(f"{name}: expected a mapping, got {type(parsed).__name__}")
    return dict(parsed)


def _parsed(override: str) -> dict[str, Any]:
    key, separator, text = override.partition("=")
    if not separator or not all(key.split(".")):
        raise UsageError(f"cannot read {override!r}; overrides are key=value, such as training.steps=200")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise UsageError(f"{key}: the value {text!r} is not valid YAML") from error
    for part in reversed(key.split(".")):
        value = {part: value}
    changes: dict[str, Any] = value
    return changes


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    above = dict(above)
    keep = above.pop("keep", [])
    if not isinstance(keep, list | tuple) or not all(isinstance(key, str) for key in keep):
        raise UsageError(f"keep: expected a list of keys that go along to another kind, got {keep!r}")
    if "kind" in above and above["kind"] != below.get("kind", above["kind"]):
        below = {key: below[key] for key in keep if key in below}
    merged = copy.deepcopy(dict(below))
    for key, value in above.items():
        under = merged.get(key)
        merged[key] = _merged(under, value) if isinstance(under, Mapping) and isinstance(value, Mapping) else value
    return merged


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value
