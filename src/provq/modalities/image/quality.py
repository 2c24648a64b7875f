"""Quality of pictures: PSNR and SSIM as torchmetrics defines them, on [0, 1]."""

import math
from typing import cast, final

from jaxtyping import Float
from torch import Tensor
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from provq.evaluation.evaluate import Measure

_WINDOW = 11  # SSIM's Gaussian window needs pictures of at least so many pixels a side


@final
class PictureQuality(Measure):
    """`psnr` in dB and `ssim`, both means over pictures; values are clipped to the range of a picture first.

    `ssim` is NaN for pictures with a side below 11 pixels.
    """

    def __init__(self) -> None:
        self._psnr = PeakSignalNoiseRatio(data_range=1.0, dim=(1, 2, 3), reduction="elementwise_mean")
        self._ssim = StructuralSimilarityIndexMeasure(data_range=1.0)
        self._measures_ssim = False

    def update(self, output: Float[Tensor, "b 3 h w"], items: Float[Tensor, "b 3 h w"]) -> None:
        """Add a batch of pictures in [-1, 1]."""
        output, items = (((pictures + 1) / 2).clamp(0, 1).cpu() for pictures in (output, items))
        self._psnr.update(output, items)
        if min(items.shape[-2:]) >= _WINDOW:
            self._measures_ssim = True
            self._ssim.update(output, items)

    def compute(self) -> dict[str, float]:
        """Both numbers."""
        return {
            "psnr": float(self._psnr.compute()),
            "ssim": float(cast(Tensor, self._ssim.compute())) if self._measures_ssim else math.nan,
        }
