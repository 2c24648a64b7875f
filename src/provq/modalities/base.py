"""What a modality brings: where its items come from, and how outputs are measured against them."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from provq.data import Items
from provq.errors import UsageError
from provq.evaluation.evaluate import Measure, squared_error
from provq.evaluation.exhibits import Exhibits
from provq.evaluation.report import Column


class Modality(ABC):
    """A kind of data; its constructor's arguments are the recipe's table `data`."""

    @abstractmethod
    def training_items(self, seed: int) -> Items:
        """What to train on, augmented as `seed` has it."""

    @abstractmethod
    def held_out_items(self) -> Items | None:
        """What was set aside, without augmentation; None where nothing was."""

    @abstractmethod
    def items_of(self, data: str) -> Items:
        """Other data, in the form of the held-out items."""

    def augmented_items(self, data: str, augmentation: str) -> Items:
        """The items of other data in several views each, the views of one item beside each other.

        Args:
            data: The data.
            augmentation: Which views; "none" is the one that `items_of` has.

        Raises:
            UsageError: This kind of data has no such views.
        """
        if augmentation != "none":
            raise UsageError(f"augment: this kind of data has no views {augmentation!r}; known: none")
        return self.items_of(data)

    @abstractmethod
    def blank_item(self) -> Float[Tensor, "1 ..."]:
        """A batch of one item of the shape that all items have, or may have."""

    def distortion(self, output: Float[Tensor, "b ..."], items: Float[Tensor, "b ..."]) -> Float[Tensor, "..."]:
        """Errors of outputs, the mean of which is what a run looks at; squared differences of all values by default."""
        return squared_error(output, items)

    @abstractmethod
    def measures(
        self,
        inception: str | Path | None = None,
        reference: str | Path | None = None,
        samples: str | Path | None = None,
    ) -> list[Measure]:
        """Fresh measures of quality.

        Args:
            inception: The file of the network by whose features distributions are compared, if they are to be.
            reference: The file of another set that outputs are compared with too; it needs `inception`.
            samples: A folder for outputs and items in the form that other evaluators read, if they are wanted.

        Raises:
            UserError: A file is not there, or this kind of data has no use for it.
        """

    @abstractmethod
    def exhibits(self, items: Items, model: Callable[[Tensor], Tensor]) -> Exhibits:
        """What a page shows: a few of the items, evenly spread, with what the model makes of a batch of them."""

    @property
    def is_shown_in_space(self) -> bool:
        """Whether its exhibits are overlays."""
        return False

    @property
    @abstractmethod
    def quality(self) -> tuple[Column, ...]:
        """Those numbers of `measures` that a comparison shows; by the first one arms are chosen and ranked."""

    @property
    @abstractmethod
    def protocol(self) -> str:
        """How held-out items are prepared and measured, in words."""
