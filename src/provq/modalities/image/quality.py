"""Quality of pictures: PSNR, SSIM and MS-SSIM as torchmetrics defines them, on [0, 1]."""

import math
from typing import cast, final

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
)
from torchmetrics.image import StructuralSimilarityIndexMeasure

from provq.evaluation.evaluate import Measure

# What rounding to 8 bits alone would cost: a variance of (1/255)^2 / 12. Beyond it a picture counts as restored.
_BEST_PSNR = 10 * math.log10(12 * 255**2)

_WINDOW = 11  # SSIM's Gaussian window needs pictures of at least so many pixels a side
_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the scales of MS-SSIM, the finest first (Wang et al. 2003)


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


@final
class MultiScaleSsim(Measure):
    """`ms_ssim`, a mean over pictures, where they are large enough for its five scales (176 pixels a side).

    Smaller pictures are measured at as many scales as fit, with the published weights of these made to sum to 1. What
    comes out is another measure, with values of its own, so its name says how many there were: `ms_ssim@3` from 44
    pixels a side on. It is NaN, and called `ms_ssim`, where not even two scales fit. All pictures of a set are measured
    at the scales that fit the first batch.
    """

    def __init__(self) -> None:
        self._scales: int | None = None
        self._values: list[Tensor] = []

    def update(self, output: Float[Tensor, "b 3 h w"], items: Float[Tensor, "b 3 h w"]) -> None:
        """Add a batch of pictures in [-1, 1]."""
        if self._scales is None:
            self._scales = _scales_that_fit(min(items.shape[-2:]))
        if self._scales < 2:
            return
        output, items = (((pictures + 1) / 2).clamp(0, 1).cpu() for pictures in (output, items))
        weights = _WEIGHTS[: self._scales]
        self._values.append(
            multiscale_structural_similarity_index_measure(
                output,
                items,
                data_range=1.0,
                betas=tuple(weight / sum(weights) for weight in weights) if self._scales < len(_WEIGHTS) else weights,
                reduction="none",
            )
        )

    def compute(self) -> dict[str, float]:
        """The one number."""
        name = f"ms_ssim@{self._scales}" if self._scales and 2 <= self._scales < len(_WEIGHTS) else "ms_ssim"
        return {name: float(torch.cat(self._values).mean()) if self._values else math.nan}


def _scales_that_fit(side: int) -> int:
    # Each scale halves the side, and SSIM's window must fit into the last; torchmetrics asks for as much of all but the
    # first, by its own rule.
    for scales in range(len(_WEIGHTS), 1, -1):
        if side >> (scales - 1) >= _WINDOW and side // (scales - 1) ** 2 >= _WINDOW:
            return scales
    return 1
