"""A tokenizer on the Hugging Face hub."""

from pathlib import Path

from provq.commands.evaluate import modality_of
from provq.evaluation.cost import cost
from provq.tokenizer import Tokenizer, opened


def push(
    tokenizer: Tokenizer | str | Path, repository: str, *, private: bool = False, revision: str | None = None
) -> str:
    """Do what `Tokenizer.push_to_hub` does, with the number of tokens and bits of an item on the page.

    Args:
        tokenizer: The tokenizer, a saved one, the folder of a run, or the name of a repository.
        repository: See `Tokenizer.push_to_hub`, as for the others.
        private: See there.
        revision: See there.

    Returns:
        The address of the commit.

    Raises:
        UserError: The tokenizer cannot be read, or the hub cannot be reached or refuses.
    """
    tokenizer = opened(tokenizer)
    about = {}
    if "data" in tokenizer.metadata:
        item = modality_of(tokenizer).blank_item()
        of_item = cost(tokenizer, item)
        shape = " x ".join(map(str, item.shape[1:]))
        about = {f"tokens of an item ({shape})": f"{of_item.tokens:,}, {of_item.bits:,.0f} bits"}
    return tokenizer.push_to_hub(repository, private=private, revision=revision, about=about)
