"""Multi-scale quantization, held against a plain implementation in numpy: windows by loops, NaN for what is missing."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch

from provq.curriculum import hand_over
from provq.errors import UsageError, UserError
from provq.ops.kmeans import kmeans
from provq.quantizers import (
    Continuous,
    FiniteScalarQuantizer,
    MultiScaleQuantizer,
    ResidualQuantizer,
    SimVQ,
    VectorQuantizer,
)

# Grids with windows: those of the papers, then what must work too.
CASES = {
    "line": ((8,), (8, 4, 1)),
    "picture": ((6, 5), (4, 2, 1)),
    "no grid": ((), (4, 1)),
    "three axes": ((3, 4, 2), (3, 2, 1)),
    "windows beyond the grid": ((3, 2), (16, 2.5, 1)),
    "a fraction": ((9,), (4.5, 1.5)),
    "one scale": ((5,), (2,)),
}
cases = pytest.mark.parametrize(("grid", "windows"), CASES.values(), ids=CASES)
ITEMS = 4


def latents(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some(shape, seed=1, share=0.6):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def exact(tensor):
    return tensor.detach().double().numpy()


def vector(dim, codes, **options):
    torch.manual_seed(0)
    return VectorQuantizer(dim, codes, **{"init": "normal", **options})


def windows_along(length, window):
    """The window that the centre of each position falls into."""
    return [int(math.floor((place + 0.5) / window)) for place in range(length)]


def between(values, length, window, axis):
    """Values at centres of windows, read at centres of positions; of two neighbours one may be missing (NaN).

    At a centre, and beyond the first and the last, there is one window alone.
    """
    values = np.moveaxis(values, axis, 0)
    made = []
    for place in np.clip((np.arange(length) + 0.5) / window - 0.5, 0, len(values) - 1):
        left, right = values[math.floor(place)], values[math.ceil(place)]
        both = left + (place - math.floor(place)) * (right - left)
        made.append(np.where(np.isnan(left), right, np.where(np.isnan(right), left, both)))
    return np.moveaxis(np.stack(made), 0, axis)


class Plain:
    """One item by loops: what each scale is given, which code it takes where, and the sum of what was spread out."""

    def __init__(self, z, keep, table, windows):
        grid, dim = z.shape[:-1], z.shape[-1]
        rest, self.total = z.copy(), np.zeros_like(z)
        self.means, self.tokens, self.placed, self.errors, self.members = [], [], [], [], []
        for window in windows:
            along = [windows_along(length, window) for length in grid]
            number = [max(places) + 1 for places in along]
            means = np.full((*number, dim), np.nan)
            tokens = np.full(number, -1)
            placed = np.full(grid, -1)
            for at in itertools.product(*(range(length) for length in number)):
                inside = [
                    place
                    for place in itertools.product(*(range(length) for length in grid))
                    if keep[place] and all(along[axis][x] == at[axis] for axis, x in enumerate(place))
                ]
                if inside:
                    means[at] = np.mean([rest[place] for place in inside], 0)
                    tokens[at] = ((table - means[at]) ** 2).sum(1).argmin()
                    placed[inside[0]] = tokens[at]
                    self.members.append((inside, means[at] - table[tokens[at]]))
            codes = np.where((tokens == -1)[..., None], np.nan, table[tokens])
            for axis, length in enumerate(grid):
                codes = between(codes, length, window, axis)
            codes = np.nan_to_num(codes)
            rest, self.total = rest - codes, self.total + codes
            self.means.append(means.reshape(-1, dim))
            self.tokens.append(tokens.flatten())
            self.placed.append(placed)
            self.errors.append((means - table[tokens])[tokens != -1])
        self.indices = np.stack(self.placed, -1)


def plainly(z, table, windows, mask=None):
    keep = np.ones(z.shape[:-1], dtype=bool) if mask is None else mask.numpy()
    return [Plain(item, kept, exact(table), windows) for item, kept in zip(exact(z), keep, strict=True)]


def shaped(indices, quantizer):
    return indices if len(quantizer.codebook_sizes) > 1 else indices[..., None]


@cases
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_values_and_indices_are_those_of_the_plain_implementation(grid, windows, masked, training):
    quantizer = MultiScaleQuantizer(vector(3, 10), windows).train(training)
    z = latents(ITEMS, *grid, 3)
    mask = some((ITEMS, *grid)) if masked else None
    expected = plainly(z, quantizer.quantizer.codebook, windows, mask)
    quantized, indices, _ = quantizer(z, mask)
    np.testing.assert_array_equal(shaped(indices, quantizer), np.stack([one.indices for one in expected]))
    total = np.stack([one.total for one in expected])
    keep = np.ones(total.shape[:-1], dtype=bool) if mask is None else mask.numpy()
    np.testing.assert_allclose(exact(quantized), np.where(keep[..., None], total, 0), rtol=1e-5, atol=2e-6)
    if min(windows) == 1:  # each kept position has a token of its own at the finest scale, and no other has
        np.testing.assert_allclose(exact(quantizer.lookup(indices)), np.where(keep[..., None], total, 0), atol=2e-6)
    else:
        kept = exact(quantizer.lookup(indices))[keep]
        np.testing.assert_allclose(kept, total[keep], rtol=1e-5, atol=2e-6)


@cases
@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_and_its_gradients_are_means_over_the_windows_of_each_scale(grid, windows, masked):
    hardness, commitment = 0.5, 0.5
    quantizer = MultiScaleQuantizer(vector(3, 10, commitment_weight=commitment), windows)
    quantizer.hardness.fill_(hardness)
    z = latents(ITEMS, *grid, 3).requires_grad_()
    mask = some((ITEMS, *grid)) if masked else None
    loss = quantizer(z, mask).loss
    loss.backward()
    plain = plainly(z, quantizer.quantizer.codebook, windows, mask)
    pays, to_latents, to_codes = 0.0, np.zeros(z.shape), np.zeros((10, 3))
    for scale in range(len(windows)):
        errors = np.concatenate([one.errors[scale] for one in plain])
        tokens = np.concatenate([one.tokens[scale] for one in plain])
        pays += (1 + commitment * hardness) * (errors**2).mean()
        np.add.at(to_codes, tokens[tokens != -1], -2 * errors / errors.size)
    sizes = [sum(one.errors[scale].size for one in plain) for scale in range(len(windows))]
    for item, one in enumerate(plain):
        of_scale = [scale for scale in range(len(windows)) for _ in one.errors[scale]]
        for scale, (inside, error) in zip(of_scale, one.members, strict=True):
            for place in inside:
                to_latents[(item, *place)] += 2 * commitment * hardness * error / len(inside) / sizes[scale]
    assert float(loss.detach()) == pytest.approx(pays, rel=1e-5)
    np.testing.assert_allclose(exact(z.grad), to_latents, rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(exact(quantizer.quantizer.codebook.grad), to_codes, rtol=1e-4, atol=1e-6)


@cases
@pytest.mark.parametrize("masked", [False, True])
def test_the_sequence_is_each_token_once_from_coarse_to_fine(grid, windows, masked):
    quantizer = MultiScaleQuantizer(vector(3, 10), windows).eval()
    z = latents(ITEMS, *grid, 3)
    mask = some((ITEMS, *grid)) if masked else None
    indices = quantizer(z, mask).indices
    expected = np.stack([np.concatenate(one.tokens) for one in plainly(z, quantizer.quantizer.codebook, windows, mask)])
    found = quantizer.sequence(indices)
    assert found.shape == (ITEMS, expected.shape[1], 1)
    np.testing.assert_array_equal(found[..., 0], expected)
    # As many tokens as the numbers of windows say.
    number = sum(math.prod(max(windows_along(length, window)) + 1 for length in grid) for window in windows)
    assert found.shape[1] == number
    present = int((indices >= 0).sum())
    assert present == int((found >= 0).sum()), "a token is counted twice"
    if mask is None:
        assert present == ITEMS * number


@pytest.mark.parametrize(("length", "window", "number"), [(8, 4, 2), (9, 4, 2), (10, 4, 2), (11, 4, 3), (5, 1.5, 4)])
def test_a_position_belongs_to_the_window_that_its_centre_falls_into(length, window, number):
    # The last window of 9 positions would begin at 8, whose centre, 8.5, lies within it: it has a token of its own.
    quantizer = MultiScaleQuantizer(vector(2, 9), (window,)).eval()
    along = windows_along(length, window)
    z = latents(1, length, 2)
    indices = quantizer(z).indices
    firsts = [along.index(one) for one in sorted(set(along))]
    assert (indices[0] >= 0).nonzero().flatten().tolist() == firsts
    assert quantizer.sequence(indices[..., None]).shape[1] == len(set(along))


def test_values_between_centres_are_on_a_line_and_constant_beyond_the_ends():
    quantizer = MultiScaleQuantizer(vector(1, 2), (4,)).eval()
    with torch.no_grad():
        quantizer.quantizer.codebook.copy_(torch.tensor([[0.0], [8.0]]))
    indices = torch.tensor([[0, -1, -1, -1, 1, -1, -1, -1]])  # windows with centres 2 and 6
    expected = np.interp(np.arange(8) + 0.5, [2, 6], [0, 8])
    np.testing.assert_allclose(quantizer.lookup(indices)[0, :, 0].detach(), expected, atol=1e-6)


@pytest.mark.parametrize("axis", [1, 2])
def test_what_is_mirrored_comes_out_mirrored_whatever_is_missing(axis):
    quantizer = MultiScaleQuantizer(vector(3, 10), (4, 2, 1)).eval()
    z, mask = latents(200, 8, 4, 3), some((200, 8, 4), share=0.3)
    expected, found = quantizer(z, mask), quantizer(z.flip(axis), mask.flip(axis))
    torch.testing.assert_close(found.quantized.flip(axis), expected.quantized)


def test_an_index_may_stand_anywhere_in_its_window():
    quantizer = MultiScaleQuantizer(vector(3, 10), (3, 1)).eval()
    indices = quantizer(latents(2, 6, 3)).indices
    moved = indices.clone()
    moved[:, [0, 2], 0] = indices[:, [2, 0], 0]  # from the first position of the first window to its last
    assert not torch.equal(moved, indices)
    assert torch.equal(quantizer.lookup(moved), quantizer.lookup(indices))


def test_a_first_part_of_the_scales_decodes_to_their_sum():
    quantizer = MultiScaleQuantizer(vector(3, 10), (6, 3, 1)).eval()
    z = latents(2, 6, 3)
    indices = quantizer(z).indices
    for number in range(1, 4):
        first = torch.where(torch.arange(3) < number, indices, -1)
        coarse = MultiScaleQuantizer(copy.deepcopy(quantizer.quantizer), (6, 3, 1)[:number]).eval()
        torch.testing.assert_close(quantizer.lookup(first), coarse(z).quantized)


def test_one_vector_alone_has_no_axis_at_all():
    quantizer = MultiScaleQuantizer(vector(3, 10), (4, 1)).eval()
    z = latents(1, 3)
    expected, found = quantizer(z), quantizer(z[0])
    assert torch.equal(found.indices, expected.indices[0])
    assert torch.equal(found.quantized, expected.quantized[0])


def test_an_item_of_which_nothing_is_kept_says_nothing_and_changes_nothing():
    quantizer = MultiScaleQuantizer(vector(3, 10), (4, 1))
    z = latents(3, 6, 3)
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[1] = False
    quantized, indices, loss = quantizer(z, mask)
    expected = quantizer(z[[0, 2]])
    torch.testing.assert_close(loss, expected.loss)
    assert bool((indices[1] == -1).all()) and not quantized[1].any()
    assert torch.equal(indices[[0, 2]], expected.indices)
    assert bool((quantizer.sequence(indices)[1] == -1).all())


@pytest.mark.parametrize("masked", [False, True])
def test_moving_averages_follow_the_means_of_all_scales_at_once(masked):
    decay, windows = 0.6, (4, 2, 1)
    quantizer = MultiScaleQuantizer(vector(3, 10, update="ema", decay=decay), windows)
    table = exact(quantizer.quantizer.codebook)
    sums, counts = table.copy(), np.ones(10)
    for seed in range(4):
        z = latents(3, 6, 5, 3, seed=seed)
        mask = some((3, 6, 5), seed) if masked else None
        plain = plainly(z, torch.from_numpy(table), windows, mask)
        quantizer(z, mask)
        means = np.concatenate([mean for one in plain for mean in one.means])
        tokens = np.concatenate([token for one in plain for token in one.tokens])
        ones = np.eye(10)[tokens[tokens != -1]]
        counts = decay * counts + (1 - decay) * ones.sum(0)
        sums = decay * sums + (1 - decay) * ones.T @ means[tokens != -1]
        table = sums / counts[:, None]
        np.testing.assert_allclose(quantizer.quantizer.ema_counts, counts, rtol=1e-5)
        np.testing.assert_allclose(quantizer.quantizer.codebook, table, rtol=1e-4, atol=1e-5)


def bands(z, keep, windows):
    """The means of one item, each scale after those of coarser ones were taken off exactly."""
    rest, found = z.copy(), []
    for window in windows:
        along = [windows_along(length, window) for length in z.shape[:-1]]
        means = np.full((*(max(places) + 1 for places in along), z.shape[-1]), np.nan)
        for at in itertools.product(*(range(length) for length in means.shape[:-1])):
            inside = [
                rest[place]
                for place in itertools.product(*(range(length) for length in z.shape[:-1]))
                if keep[place] and all(along[axis][x] == at[axis] for axis, x in enumerate(place))
            ]
            if inside:
                means[at] = np.mean(inside, 0)
        found.append(means.reshape(-1, z.shape[-1]))
        for axis, length in enumerate(z.shape[:-1]):
            means = between(means, length, window, axis)
        rest = rest - np.nan_to_num(means)
    return np.concatenate(found)


@cases
@pytest.mark.parametrize("masked", [False, True])
def test_the_codebook_starts_on_the_means_of_all_scales(grid, windows, masked):
    quantizer = MultiScaleQuantizer(vector(3, 4, init="kmeans"), windows)
    z = latents(20, *grid, 3)
    mask = some((20, *grid)) if masked else torch.ones(20, *grid, dtype=torch.bool)
    expected = np.concatenate([bands(one, kept, windows) for one, kept in zip(exact(z), mask.numpy(), strict=True)])
    expected = expected[~np.isnan(expected[:, 0])]
    evidence = quantizer.evidence(z, mask)
    np.testing.assert_allclose(evidence, expected, rtol=1e-4, atol=2e-6)
    centres, _ = kmeans(evidence, torch.ones(len(evidence), dtype=torch.bool), 4)
    assert quantizer.awaits_latents
    quantizer(z, mask)
    assert not quantizer.awaits_latents
    torch.testing.assert_close(quantizer.quantizer.codebook.detach(), centres)


def test_a_hand_over_counts_the_means_and_founds_the_codebook_on_them():
    quantizer = MultiScaleQuantizer(vector(3, 8), (4, 1))
    z = latents(6, 8, 3)
    centres, _ = kmeans(quantizer.evidence(z, torch.ones(6, 8, dtype=torch.bool)), torch.ones(60, dtype=torch.bool), 8)
    (record,) = hand_over(quantizer, lambda: quantizer(z))
    assert record.latents == 6 * (2 + 8)
    assert record.relative_error_after < record.relative_error_before
    torch.testing.assert_close(quantizer.quantizer.codebook.detach(), centres)
    with pytest.raises(UserError, match=r"codebook_size=8, vectors=7\b"):
        quantizer.found(latents(7, 3))


def test_a_finer_scale_makes_the_error_smaller():
    quantizer = MultiScaleQuantizer(vector(3, 32, init="kmeans"), (8, 4, 2, 1))
    z = latents(40, 8, 3).cumsum(1)  # smooth, as a picture is
    quantizer(z)
    indices = quantizer.eval()(z).indices
    errors = [
        (exact(z - quantizer.lookup(torch.where(torch.arange(4) < number, indices, -1))) ** 2).mean()
        for number in range(5)
    ]
    assert all(later < earlier for earlier, later in zip(errors, errors[1:], strict=False)), errors
    assert errors[-1] < 0.2 * errors[0]


@pytest.mark.parametrize("grid", [(), (7,), (4, 3)])
def test_a_scale_may_have_several_codebooks(grid):
    torch.manual_seed(0)
    inner = ResidualQuantizer([VectorQuantizer(2, 6, init="normal"), VectorQuantizer(2, 5, init="normal")])
    quantizer = MultiScaleQuantizer(inner, (3, 1)).eval()
    assert quantizer.codebook_sizes == (6, 5, 6, 5)
    z = latents(ITEMS, *grid, 2)
    mask = some((ITEMS, *grid), share=0.8)
    quantized, indices, _ = quantizer(z, mask)
    assert indices.shape == (ITEMS, *grid, 4)
    torch.testing.assert_close(torch.where(mask[..., None], quantizer.lookup(indices), 0.0), quantized)
    tokens = quantizer.sequence(indices)
    number = sum(math.prod(max(windows_along(length, window)) + 1 for length in grid) for window in (3, 1))
    assert tokens.shape == (ITEMS, number, 2)
    # The finest scale has a window a position: a token wherever something is kept, in both of its codebooks.
    at_positions = tokens[:, -math.prod(grid) :].reshape(ITEMS, *grid, 2)
    assert torch.equal(at_positions, indices[..., 2:])
    assert torch.equal(at_positions >= 0, mask[..., None].expand(ITEMS, *grid, 2))


def test_windows_of_one_position_without_a_coarse_scale_are_the_quantizer_itself():
    inner = vector(3, 10, update="ema")
    alone = copy.deepcopy(inner)
    quantizer = MultiScaleQuantizer(inner, (1,))
    z = latents(2, 4, 5, 3)
    mask = some((2, 4, 5))
    found, expected = quantizer(z, mask), alone(z, mask)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.quantized, expected.quantized)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(quantizer.quantizer.codebook, alone.codebook)


@pytest.mark.parametrize("dim", [None, 5])
def test_baked_it_gives_the_same_tokens_and_values(dim):
    torch.manual_seed(0)
    quantizer = MultiScaleQuantizer(SimVQ(3, 20), (4, 2, 1), dim=dim).eval()
    baked = quantizer.baked()
    assert isinstance(baked.quantizer, VectorQuantizer)
    z = latents(3, 6, 5, quantizer.dim)
    expected, found = quantizer(z), baked(z)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.quantized, expected.quantized)
    assert torch.equal(baked.lookup(found.indices), quantizer.lookup(expected.indices))


@pytest.mark.parametrize(
    ("quantizer", "windows", "sentence"),
    [
        (vector(4, 5), (), ".windows: tuple should have at least 1 item"),
        (vector(4, 5), (4, 0.5), ".windows.1: input should be greater than or equal to 1, got 0.5"),
        (vector(4, 5, codebook_dim=2), (4, 1), r": quantizer\[0\] projects from dim=4 to 2 by itself"),
        (FiniteScalarQuantizer([5, 5], dim=4), (4, 1), r": quantizer\[0\] projects from dim=4 to 2 by itself"),
        (Continuous(4), (4, 1), r": quantizer\[0\] is a Continuous, which makes no tokens"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_place(quantizer, windows, sentence):
    with pytest.raises(UsageError, match=f"^MultiScaleQuantizer{sentence}"):
        MultiScaleQuantizer(quantizer, windows)
