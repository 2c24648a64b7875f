"""Pictures as a modality: the recipe's table `data` with `kind: image`."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Annotated, final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from provq.data import Item, Items
from provq.errors import UsageError, nearest
from provq.evaluation.evaluate import Measure
from provq.evaluation.exhibits import Exhibits
from provq.evaluation.report import Column
from provq.modalities.base import Modality
from provq.modalities.image.fidelity import ReconstructionFrechet, ReferenceFrechet, Samples
from provq.modalities.image.pixels import to_image, to_png
from provq.modalities.image.quality import PictureQuality
from provq.modalities.image.sources import open_source
from provq.modalities.image.views import AUGMENTATIONS, CentralViews, Resize, SeveralViews, TrainingViews
from provq.networks.inception import FidInception
from provq.spec import checked

_SHOWN = 8  # pictures on a page


@final
class Images(Modality):
    """Square RGB pictures in [-1, 1].

    Args:
        train: Where training pictures lie: a folder, a tar or a glob of tars, `hf:NAME` (a data set of the Hugging
            Face hub, see `hub.open_hub`), `shards:WHERE` (tars that stream from a network, see `shards.open_shards`),
            `embedded:photographs` or `embedded:digits`; behind embedded data "/train" or "/val" names one part of them.
        val: Where held-out pictures lie; left out, embedded data hold out a part of their own and other data nothing.
        size: The side of the squares, in pixels.
        resize: "shorter" scales a picture down until its shorter side has `size` pixels before it is cut; "adm" scales
            it up or down as the published tables of ImageNet do; "none" cuts at its own resolution.
        flip: Whether training mirrors every other picture by chance.
        smallest_crop: The least share of a picture's shorter side that a training square covers, in (0, 1].

    Raises:
        UsageError: An argument is out of bounds.
    """

    @checked
    def __init__(
        self,
        train: str = "embedded:photographs",
        val: str | None = None,
        size: Annotated[int, Field(ge=1)] = 64,
        resize: Resize = "shorter",
        flip: bool = True,
        smallest_crop: Annotated[float, Field(gt=0, le=1)] = 1.0,
    ) -> None:
        if resize == "none" and smallest_crop < 1:
            raise UsageError("Images: with resize='none' squares have one size, so smallest_crop must be 1")
        self.train = train
        self.val = val
        self.size = size
        self.resize = resize
        self.flip = flip
        self.smallest_crop = smallest_crop

    def training_items(self, seed: int) -> Items:
        """Random squares of the training pictures."""
        source = open_source(self.train, split="train", size=self.size)
        return TrainingViews(
            source,
            size=self.size,
            resize=self.resize,
            flip=self.flip,
            seed=seed,
            smallest_crop=self.smallest_crop,
        )

    def held_out_items(self) -> Items | None:
        """Central squares of the held-out pictures."""
        if self.val is not None:
            return self.items_of(self.val)
        holds_out = self.train.startswith("embedded:") and "/" not in self.train
        return self.items_of(self.train) if holds_out else None

    def items_of(self, data: str) -> Items:
        """Central squares of other pictures; embedded data give the part they hold out."""
        return CentralViews(open_source(data, split="val", size=self.size), size=self.size, resize=self.resize)

    def augmented_items(self, data: str, augmentation: str) -> Items:
        """The square in the middle ("none"), that and its mirror image ("flip"), or ten squares ("ten-crop").

        Raises:
            UsageError: There are no such views.
        """
        if augmentation == "none":
            return self.items_of(data)
        if augmentation not in AUGMENTATIONS:
            raise UsageError(
                f"augment: pictures have no views {augmentation!r}; {nearest(augmentation, ('none', *AUGMENTATIONS))}"
            )
        source = open_source(data, split="val", size=self.size)
        return SeveralViews(source, size=self.size, resize=self.resize, augmentation=augmentation)

    def blank_item(self) -> Float[Tensor, "1 3 size size"]:
        """A grey square."""
        return torch.zeros(1, 3, self.size, self.size)

    def measures(
        self,
        inception: str | Path | None = None,
        reference: str | Path | None = None,
        samples: str | Path | None = None,
    ) -> list[Measure]:
        """PSNR and SSIM; with the weights of Inception-v3 also Fréchet distances to the originals and to a reference.

        Args:
            inception: The weights.
            reference: An `.npz` file with pictures or their statistics, as ADM publishes them; it needs `inception`.
            samples: A folder for reconstructions and originals as ADM's evaluator reads them.

        Raises:
            UsageError: There is a reference without the weights.
            UserError: A file is not there, or is something else.
        """
        measures: list[Measure] = [PictureQuality()]
        if reference is not None and inception is None:
            raise UsageError("reference: needs the network whose features are compared; give its weights as inception")
        if inception is not None:
            network = FidInception(inception)
            measures.append(ReconstructionFrechet(network))
            if reference is not None:
                measures.append(ReferenceFrechet(network, reference))
        return measures if samples is None else [*measures, Samples(samples)]

    def exhibits(self, items: Items, model: Callable[[Tensor], Tensor]) -> Exhibits:
        """Eight pictures, and their reconstructions."""
        read = (items.item(index, 0) for index in range(0, len(items), max(1, len(items) // _SHOWN)))
        values = torch.stack(list(islice((item.values for item in read if isinstance(item, Item)), _SHOWN)))
        originals, reconstructions = (
            [to_png(to_image(picture)) for picture in pictures] for pictures in (values, model(values))
        )
        return Exhibits(originals, reconstructions)

    @property
    def quality(self) -> tuple[Column, ...]:
        """PSNR and SSIM."""
        return (
            Column("psnr", "PSNR", 2, True, "Closeness to the originals; +1 dB is 21 % less error.", "dB"),
            Column("ssim", "SSIM", 3, True, "Likeness of structure to the originals; 1 is identical."),
        )

    @property
    def protocol(self) -> str:
        """The crop, the filters that scale, and the range of values."""
        scaled = {
            "shorter": f"shorter side scaled down to {self.size} pixels (Lanczos)",
            "adm": f"shorter side scaled to {self.size} pixels (halved by boxes, then bicubic, as ADM does)",
            "none": "not scaled",
        }[self.resize]
        return (
            f"pictures {scaled}, central square of {self.size} pixels; hard codes; PSNR and SSIM (Gaussian window of "
            "11, data range 1) per picture, then the mean"
        )
