"""Quality of pictures: PSNR and SSIM as torchmetrics defines them, on [0, 1]."""

import math
from typing import cast, final

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio
from torchmetrics.image import StructuralSimilarityIndexMeasure

from provq.evaluation.evaluate import Measure

# What rounding to 8 bits alone would cost: a variance of (1/255)^2 / 12. Beyond it a picture counts as restored.
_BEST_PSNR = 10 * math.log10(12 * 255**2)

_WINDOW = 11  # SSIM's Gaussian window needs pictures of at least so many pixels a side


@final
class PictureQuality(Measure):
    """`psnr` in dB and `ssim`, both means over pictures; values are clipped to the range of a picture first.

    A picture's PSNR counts for at most 58.9 dB, that of rounding to 8 bits, so that a perfect one (a plain white
    picture, say) does not make the mean infinite. `ssim` is NaN for pictures with a side below 11 pixels.
    """

    def __init__(self) -> None:
        self._psnrs: list[Tensor] = []
        self._ssim = StructuralSimilarityIndexMeasure(data_range=1.0)
        self._measures_ssim = False

    def update(self, output: Float[Tensor, "b 3 h w"], items: Float[Tensor, "b 3 h w"]) -> None:
        """Add a batch of pictures in [-1, 1]."""
        output, items = (((pictures + 1) / 2).clamp(0, 1).cpu() for pictures in (output, items))
        psnrs = peak_signal_noise_ratio(output, items, data_range=1.0, dim=(1, 2, 3), reduction="none")
        self._psnrs.append(psnrs.clamp_max(_BEST_PSNR))
        if min(items.shape[-2:]) >= _WINDOW:
            self._measures_ssim = True
            self._ssim.update(output, items)

    def compute(self) -> dict[str, float]:
        """Both numbers."""
        return {
            "psnr": float(torch.cat(self._psnrs).mean()) if self._psnrs else math.nan,
            "ssim": float(cast(Tensor, self._ssim.compute())) if self._measures_ssim else math.nan,
        }
