"""A prior together with the tokenizer whose tokens it draws: what making new items needs, in one folder.

FOLDER/config.json, model.safetensors               the prior
tokenizer/config.json, model.safetensors     the tokenizer
"""

from pathlib import Path
from typing import NamedTuple

from provq.errors import UserError
from provq.generation.base import Prior
from provq.generation.checkpoint import folder_of, load_prior
from provq.tokenizer import Tokenizer

_BESIDE = "tokenizer"
_FILES = (f"{_BESIDE}/config.json", f"{_BESIDE}/model.safetensors")


class Pair(NamedTuple):
    """A prior and the tokenizer whose tokens it draws; the prior's metadata name it under `tokenizer`."""

    prior: Prior
    tokenizer: Tokenizer

    def save(self, folder: Path) -> None:
        """Write both into a folder, which is made where it is missing."""
        self.tokenizer.save_pretrained(folder / _BESIDE)
        self.prior.save_pretrained(folder)


def load_pair(place: str | Path) -> Pair:
    """Read both, in evaluation mode; nothing that is read can run code.

    Args:
        place: A saved prior, or the folder of a run, whose newest checkpoint is taken; or, as text, the name
            `organisation/name` of a repository of the Hugging Face hub, where there is no such folder.

    Raises:
        UserError: There is no prior, no tokenizer beside it or another one, files are damaged or of a newer format, or
            the hub cannot be reached.
    """
    try:
        prior = load_prior(place)
    except UserError:
        if _is_tokenizer(place):
            raise UserError(
                f"{place} holds a tokenizer, and a prior is wanted, which draws the tokens that a tokenizer decodes; "
                "`provq train` with a recipe whose name begins with prior/ trains one"
            ) from None
        raise
    folder = folder_of(place, _FILES)
    if not (folder / _BESIDE).is_dir():
        raise UserError(f"{folder} holds no tokenizer beside the prior, in the folder {_BESIDE!r}: put the one there")
    tokenizer = Tokenizer.from_pretrained(folder / _BESIDE)
    wanted = prior.metadata.get("tokenizer")
    if wanted not in (None, tokenizer.fingerprint):
        raise UserError(
            f"{folder / _BESIDE} is the tokenizer {tokenizer.fingerprint}, and the prior beside it learned the tokens "
            f"of {wanted}; put that one there"
        )
    return Pair(prior, tokenizer)


def _is_tokenizer(place: str | Path) -> bool:
    try:
        Tokenizer.from_pretrained(place)
    except UserError:
        return False
    return True
