"""A prior out of a folder: what `save_pretrained` or a training run wrote."""

import json
from pathlib import Path

from safetensors.torch import load_file

from provq import hub
from provq.errors import UserError
from provq.files import newest_saved
from provq.generation.autoregressive import AutoregressivePrior
from provq.generation.base import FORMAT, Prior
from provq.generation.masked import MaskedPrior
from provq.spec import build

KINDS: dict[str, type[Prior]] = {kind.kind: kind for kind in (AutoregressivePrior, MaskedPrior)}
_FILES = ("config.json", "model.safetensors")


def load_prior(place: str | Path) -> Prior:
    """Read a prior, in evaluation mode; nothing that is read can run code.

    Args:
        place: A saved prior, or the folder of a run, whose newest checkpoint is taken; or, as text, the name
            `organisation/name` of a repository of the Hugging Face hub, where there is no such folder.

    Raises:
        UserError: There is no prior, its files are damaged or of a newer format, or the hub cannot be reached.
    """
    folder = folder_of(place)
    try:
        config = json.loads((folder / "config.json").read_text())
        weights = load_file(folder / "model.safetensors")
    except Exception as error:  # safetensors raises its own type, which derives from Exception alone
        raise UserError(f"{folder}: cannot read the prior: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT or "prior" not in config:
        raise UserError(f"{folder}/config.json: expected a prior of format {FORMAT}; is it a tokenizer, or newer?")
    prior = build(config["prior"], KINDS, where=f"{folder}/config.json: prior")
    metadata = config.get("metadata", {})
    if not isinstance(metadata, dict):
        raise UserError(f"{folder}/config.json: metadata: expected a mapping, got {metadata!r}")
    prior.metadata = metadata
    try:
        prior.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{folder}/model.safetensors does not fit config.json: {error}") from error
    return prior.eval()


def folder_of(place: str | Path, files: tuple[str, ...] = _FILES) -> Path:
    """Where a prior is on this machine: a saved one, the newest of a run, or `files` of a repository of the hub.

    Raises:
        UserError: There is none, or the hub cannot be reached.
    """
    folder = Path(place)
    if isinstance(place, str) and hub.is_repository(place) and not folder.exists():
        return hub.download(place, files)
    return newest_saved(folder, "prior")
