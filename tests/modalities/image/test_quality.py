"""PSNR and SSIM against their formulas, in numpy and scipy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from provq.modalities.image.quality import MultiScaleSsim, PictureQuality


def pictures(number, height, width, seed=0, scale=1.0):
    """Smooth pictures and spoilt copies, each spoilt by another amount; some values leave [-1, 1]."""
    generator = np.random.default_rng(seed)
    items = gaussian_filter(generator.normal(size=(number, 3, height, width)), (0, 0, 2, 2)) * 4
    noise = generator.normal(size=items.shape) * np.linspace(0.05, 0.5, number)[:, None, None, None]
    return [torch.from_numpy(values).float() for values in (items + scale * noise, items.clip(-1, 1))]


def unit(values):
    return ((values.double().numpy() + 1) / 2).clip(0, 1)


def psnr(output, items):
    """10 log10(1 / mean squared error), one number a picture."""
    return [10 * math.log10(1 / ((a - b) ** 2).mean()) for a, b in zip(unit(output), unit(items), strict=True)]


def ssim(output, items):
    """Wang et al. 2004, equation 13, Gaussian window of 11 pixels, sigma 1.5; pictures go on as in a mirror."""

    def blurred(values):
        return gaussian_filter(values, (0, 0, 1.5, 1.5), radius=(0, 0, 5, 5), mode="mirror")

    x, y = unit(output), unit(items)
    mean_x, mean_y = blurred(x), blurred(y)
    variance_x, variance_y = blurred(x * x) - mean_x**2, blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    local = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    )
    return local.mean((1, 2, 3))


def quality(*batches):
    measure = PictureQuality()
    for output, items in batches:
        measure.update(output, items)
    return measure.compute()


@settings(max_examples=12, deadline=None)
@given(number=st.integers(1, 4), height=st.integers(11, 30), width=st.integers(11, 30), seed=st.integers(0, 1000))
def test_both_numbers_are_means_over_pictures_of_the_formulas(number, height, width, seed):
    output, items = pictures(number, height, width, seed)
    found = quality((output, items))
    assert found["psnr"] == pytest.approx(np.mean(psnr(output, items)), rel=1e-4)
    assert found["ssim"] == pytest.approx(np.mean(ssim(output, items)), abs=2e-4)


def test_a_mean_over_pictures_is_not_one_over_batches():
    output, items = pictures(5, 16, 16)
    values = psnr(output, items)
    found = quality((output[:4], items[:4]), (output[4:], items[4:]))
    assert found["psnr"] == pytest.approx(np.mean(values), rel=1e-4)
    assert found["ssim"] == pytest.approx(np.mean(ssim(output, items)), abs=2e-4)
    assert abs(np.mean(values) - (np.mean(values[:4]) + values[4]) / 2) > 0.5, "the data show no difference"


def test_a_constant_error_has_the_number_that_one_knows():
    items = torch.zeros(2, 3, 16, 16)
    # 0.2 in [-1, 1] is 0.1 in [0, 1]: 20 dB.
    assert quality((items + 0.2, items))["psnr"] == pytest.approx(20, abs=1e-3)


def test_what_leaves_the_range_of_a_picture_is_clipped():
    _, items = pictures(2, 16, 16)
    far = torch.where(items > 0, 7.0, -7.0)
    assert quality((far, items)) == pytest.approx(quality((far.sign(), items)))


def test_a_perfect_copy_counts_as_one_that_was_rounded_to_8_bits():
    output, items = pictures(2, 16, 16)
    best = 10 * math.log10(12 * 255**2)  # rounding has a variance of a twelfth of a step
    assert quality((items, items)) == {"psnr": pytest.approx(best), "ssim": pytest.approx(1)}
    output[0] = items[0]
    assert quality((output, items))["psnr"] == pytest.approx((best + psnr(output[1:], items[1:])[0]) / 2, rel=1e-4)


@pytest.mark.parametrize(
    ("height", "width", "known"), [(10, 30, False), (30, 10, False), (1, 7, False), (11, 11, True)]
)
def test_pictures_smaller_than_its_window_have_no_ssim(height, width, known):
    output, items = pictures(3, height, width)
    found = quality((output, items))
    assert math.isnan(found["ssim"]) != known
    assert found["psnr"] == pytest.approx(np.mean(psnr(output, items)), rel=1e-4)


def test_measures_share_nothing():
    output, items = pictures(2, 16, 16)
    expected = quality((output, items))
    quality((-items, items))
    assert quality((output, items)) == expected


def multi_scale_ssim(output, items, weights):
    """Wang et al. 2003: contrast at each scale but the last, likeness at the last, as powers.

    Contrast is taken where the window lies inside the picture, likeness everywhere, as torchmetrics has it.
    """

    def blurred(values):
        return gaussian_filter(values, (0, 0, 1.5, 1.5), radius=(0, 0, 5, 5), mode="mirror")

    x, y = unit(output), unit(items)
    result = np.ones(len(x))
    for scale, weight in enumerate(weights):
        contrast = 2 * (blurred(x * y) - blurred(x) * blurred(y)) + 0.03**2
        contrast /= blurred(x * x) - blurred(x) ** 2 + blurred(y * y) - blurred(y) ** 2 + 0.03**2
        likeness = (2 * blurred(x) * blurred(y) + 0.01**2) / (blurred(x) ** 2 + blurred(y) ** 2 + 0.01**2) * contrast
        last = scale == len(weights) - 1
        mean = likeness.mean((1, 2, 3)) if last else contrast[:, :, 5:-5, 5:-5].mean((1, 2, 3))
        result *= mean.clip(0) ** weight
        if last:
            break
        x, y = (v.reshape(*v.shape[:2], v.shape[2] // 2, 2, v.shape[3] // 2, 2).mean((3, 5)) for v in (x, y))
    return result


@pytest.mark.parametrize(
    ("side", "scales", "name"), [(64, 3, "ms_ssim@3"), (32, 2, "ms_ssim@2"), (176, 5, "ms_ssim"), (96, 3, "ms_ssim@3")]
)
def test_several_scales_are_those_of_the_formula_and_named_where_they_are_fewer(side, scales, name):
    output, items = pictures(3, side, side)
    measure = MultiScaleSsim()
    measure.update(output[:2], items[:2])
    measure.update(output[2:], items[2:])
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333])[:scales]
    weights = weights / weights.sum() if scales < 5 else weights
    assert measure.compute() == {name: pytest.approx(multi_scale_ssim(output, items, weights).mean(), abs=5e-4)}


def test_pictures_too_small_for_two_scales_have_no_multi_scale_ssim():
    measure = MultiScaleSsim()
    measure.update(*pictures(2, 16, 16))
    assert math.isnan(measure.compute()["ms_ssim"])
