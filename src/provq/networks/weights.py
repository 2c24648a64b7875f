"""Weights that others published, read from a file that the user has: never by running code, never from the internet."""

from collections.abc import Mapping
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from provq.errors import UserError


@final
class WeightsFile:
    """The tensors of a published file by name.

    Args:
        path: The file.
        owner: Whose weights they are, in error sentences.
        network: Which network the file should hold, with its article.
        published: What to give instead of another file, and where it is to be had.
        missing: What to do where there is no file.

    Raises:
        UserError: The file is not there, is damaged, or holds no table.
    """

    def __init__(self, path: Path, *, owner: str, network: str, published: str, missing: str) -> None:
        if not path.is_file():
            raise UserError(f"the weights of {owner} are not at {str(path)!r}; {missing}")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises several types for damaged files
            raise UserError(f"{path}: cannot read the weights of {owner}: {error}") from error
        if not isinstance(state, Mapping):
            raise UserError(f"{path}: expected the weights of {network} by name, found {type(state).__name__}")
        self._path = path
        self._published = published
        self._state = state

    def tensor(self, name: str, shape: torch.Size) -> Tensor:
        """The tensor of a name.

        Raises:
            UserError: It is missing, or has another shape.
        """
        found = self._state.get(name)
        if not isinstance(found, Tensor) or found.shape != shape:
            what = tuple(found.shape) if isinstance(found, Tensor) else "nothing"
            raise UserError(
                f"{self._path}: {name!r}: expected shape {tuple(shape)}, found {what}; give {self._published}"
            )
        return found
