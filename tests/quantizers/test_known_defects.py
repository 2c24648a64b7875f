"""Defects of vector-quantize-pytorch 1.32.0, and of others where they are named: what goes wrong there holds here.

The first line of a test says what goes wrong elsewhere; a bare "#n" is a thread of lucidrains/vector-quantize-pytorch.
Three more defects show on several ranks only and stand in test_ranks.py: a module built before the process group stays
out of it, a rank without a token hangs the others, and buffers take the statistics of the first rank.
"""

import copy
import json
import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from makes import MAKES
from torch import nn

from provq.curriculum import hand_over
from provq.errors import UsageError, UserError
from provq.quantizers import (
    Continuous,
    FiniteScalarQuantizer,
    IndexBackpropQuantizer,
    MultiScaleQuantizer,
    Quantizer,
    ResidualQuantizer,
    SimVQ,
    VectorQuantizer,
)

SINGLE = {name: make for name, make in MAKES.items() if not make().members}
LEARNED = {name: make for name, make in MAKES.items() if make().codes_to_found}
PROJECTIONS = {"plain": {}, "codebook_dim": {"codebook_dim": 3}, "heads": {"heads": 2}}
PROJECTIONS["heads-codebook_dim"] = {"heads": 2, "codebook_dim": 4}
# The leading axes of one vector, a batch of sequences, of pictures and of volumes.
LAYOUTS = {"token": (), "sequence": (2, 9), "picture": (2, 3, 4), "volume": (2, 2, 3, 4)}


def latents(*shape, seed=0):
    # Not from a seed that a codebook is made with: these would be the codes themselves.
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + seed))


def made(make, seed=0):
    torch.manual_seed(seed)
    return make()


def started(make, seed=0):
    """A quantizer whose codebook has settled on a first batch."""
    quantizer = made(make, seed)
    quantizer(latents(4, 128, quantizer.dim, seed=9))
    return quantizer


def codebook_of(quantizer):
    """All that codes are made of, and the statistics, under their names."""
    parameters = {id(parameter) for parameter in quantizer.codebook_parameters()}
    return {
        name: tensor
        for name, tensor in quantizer.state_dict(keep_vars=True).items()
        if id(tensor) in parameters or not isinstance(tensor, nn.Parameter)
    }


def frozen_copy(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same(found, expected):
    for name, value in expected.items():
        assert torch.equal(found[name], value), f"{name} differs"


def in_fresh_process(script, root):
    """What a script prints as JSON; there no import hook checks shapes, which compilers and memory counts would see."""
    folder = root / "tests" / "quantizers"
    run = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("make", SINGLE.values(), ids=SINGLE)
def test_adding_to_a_returned_tensor_in_place_changes_no_later_call(make, training):
    """In evaluation, and with commitment_weight=0, the loss is a buffer of the module: `loss += x` stays in it."""
    quantizer = started(make).train(training)
    for part in quantizer.modules():
        if hasattr(part, "commitment_weight"):
            part.commitment_weight = 0.0
    twin = copy.deepcopy(quantizer)
    z = latents(2, 20, quantizer.dim)
    before = z.clone()
    with torch.no_grad():
        for tensor in (*quantizer(z), quantizer.lookup(torch.zeros(3, max(1, len(quantizer.codebook_sizes))).long())):
            tensor += 7
        twin(z)
        assert torch.equal(z, before), "what is returned is what was given"
        torch.manual_seed(1)
        found = quantizer(z)
        torch.manual_seed(1)
        for mine, expected in zip(found, twin(z), strict=True):
            assert torch.equal(mine, expected)


@pytest.mark.parametrize("update", ["gradient", "ema"])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
@pytest.mark.parametrize("options", PROJECTIONS.values(), ids=PROJECTIONS)
def test_a_mask_works_with_projections_and_heads(options, distance, update):
    """With codebook_dim or heads a mask raises in training: codes are compared with latents that were not projected."""
    masked = made(partial(VectorQuantizer, 6, 8, update=update, distance=distance, init="normal", **options))
    alone = copy.deepcopy(masked)
    z = latents(3, 10, 6)
    mask = latents(3, 10, seed=1) > 0
    quantized, indices, loss = masked(z, mask)
    expected = alone(z[mask])
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(quantized[mask], expected.quantized)
    assert torch.equal(indices[mask], expected.indices)
    assert not quantized[~mask].any()
    assert (indices[~mask] == -1).all()
    assert_close_states(masked, alone)
    if list(masked.parameters()):
        (loss + quantized.square().sum()).backward()
        (expected.loss + expected.quantized.square().sum()).backward()
        for mine, its in zip(masked.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, its.grad)


def assert_close_states(one, other):
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("options", PROJECTIONS.values(), ids=PROJECTIONS)
@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_a_mask_of_true_alone_costs_nothing_with_cosine_distance(update, options):
    """With an all-true mask the loss with cosine codes is 28.34 instead of 0.097."""
    quantizer = made(partial(VectorQuantizer, 6, 8, update=update, distance="cosine", init="normal", **options))
    masked = copy.deepcopy(quantizer)
    codes = quantizer.table().detach().double()
    z = 10 * latents(3, 10, 6)
    expected = quantizer(z)
    found = masked(z, torch.ones(3, 10, dtype=torch.bool))
    for mine, its in zip(found, expected, strict=True):
        assert torch.equal(mine, its)
    assert_same(masked.state_dict(), quantizer.state_dict())
    if not options:
        u = nn.functional.normalize(z.double(), dim=-1)
        error = 2 - 2 * (u @ codes.T).amax(-1)  # of two unit vectors
        weight = 1.25 if update == "gradient" else 0.25
        assert float(found.loss.detach()) == pytest.approx(weight * float(error.mean()) / 6, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("options", PROJECTIONS.values(), ids=PROJECTIONS)
def test_layouts_are_but_ways_to_count_the_same_tokens(options, layout):
    """Lengths are read from the channel axis with channels first, and a mask with pictures dies on a bare assert."""
    quantizer = started(partial(VectorQuantizer, 6, 8, **options)).eval()
    z = latents(*layout, 6)
    mask = latents(*layout, seed=1) > 0
    found = quantizer(z, mask)
    flat = quantizer(z.reshape(-1, 6), mask.reshape(-1))
    codebooks = (2,) if "heads" in options else ()
    assert found.indices.shape == (*layout, *codebooks)
    assert torch.equal(found.quantized.reshape(-1, 6), flat.quantized)
    assert torch.equal(found.indices.reshape(-1, *codebooks), flat.indices)
    assert torch.equal(found.loss, flat.loss)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_decoding_gives_the_hard_output_in_every_layout_and_projection(make, layout):
    """With codebook_dim, indices of pictures cannot be decoded (#113 mended sequences alone)."""
    quantizer = started(make).eval()
    z = latents(*layout, quantizer.dim)
    quantized, indices, _ = quantizer(z)
    assert quantized.shape == z.shape
    assert torch.equal(quantizer.lookup(indices), quantized)
    assert torch.equal(quantizer.assign(quantizer.enter(z)), indices)
    assert torch.equal(quantizer.lookup(quantizer.assign(quantizer.enter(z))), quantized)


@pytest.mark.parametrize("layout", [(2, 9), (2, 3, 4)], ids=["sequence", "picture"])
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_decoding_what_was_masked_gives_zeros(make, layout):
    """A masked place has the index -1, which elsewhere is decoded as the last code."""
    quantizer = started(make).eval()
    z = latents(*layout, quantizer.dim)
    mask = torch.ones(layout, dtype=torch.bool)
    mask[0, 1:] = False
    quantized, indices, _ = quantizer(z, mask)
    assert (indices[0, 1:] == -1).all()
    assert not quantized[0, 1:].any()
    assert torch.equal(quantizer.lookup(indices), quantized)


@pytest.mark.parametrize("dim", [6, 8], ids=["plain", "projected"])
@pytest.mark.parametrize("windows", [(4,), (4, 2)], ids=str)
def test_decoding_gives_the_hard_output_where_several_positions_share_a_token(windows, dim):
    """A position whose token stands at another one is no absent token."""
    quantizer = started(lambda: MultiScaleQuantizer(VectorQuantizer(6, 16), windows, dim=dim)).eval()
    quantized, indices, _ = quantizer(latents(2, 8, 8, dim))
    assert (quantized != 0).any(-1).all()
    torch.testing.assert_close(quantizer.lookup(indices), quantized)


@pytest.mark.parametrize("start", [made, started], ids=["first batch", "later batch"])
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_without_a_token_the_loss_is_zero_and_still_has_a_gradient(make, start):
    """With all tokens masked, or none at all, the loss is NaN."""
    full = started(make)
    usual = full(latents(2, 5, full.dim).requires_grad_())
    (usual.loss + usual.quantized.sum()).backward()
    for shape, mask in (((0, 5), None), ((2, 5), torch.zeros(2, 5, dtype=torch.bool))):
        quantizer = start(make)
        before = frozen_copy(quantizer.state_dict())
        z = latents(*shape, quantizer.dim).requires_grad_()
        quantized, indices, loss = quantizer(z, mask)
        assert float(loss.detach()) == 0
        assert quantized.shape == z.shape
        assert (indices == -1).all()
        (loss + quantized.sum()).backward()
        assert z.grad is not None
        assert not z.grad.any()
        assert_same(quantizer.state_dict(), before)
        # The same parameters have a gradient as of a full batch, so that no rank waits for one.
        for (name, mine), its in zip(quantizer.named_parameters(), full.parameters(), strict=True):
            assert (mine.grad is None) == (its.grad is None), f"{name} has a gradient with tokens or without, not both"
            assert mine.grad is None or not mine.grad.any(), f"{name} learns from nothing"


@pytest.mark.parametrize("start", [made, started], ids=["first batch", "later batch"])
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_one_token_that_is_not_finite_spoils_no_code_and_no_gradient(make, start):
    """One NaN or infinity in a batch makes all codes NaN after one step of moving averages."""
    spoilt = start(make)
    clean = copy.deepcopy(spoilt)
    z = latents(3, 128, spoilt.dim)
    bad = latents(1, 128, spoilt.dim)
    bad[..., 0] = torch.tensor([math.nan, math.inf, -math.inf, math.nan]).repeat(32)
    given = torch.cat([z, bad]).requires_grad_()
    torch.manual_seed(1)
    found = spoilt(given)
    torch.manual_seed(1)
    expected = clean(z)
    assert (found.indices[3] == -1).all()
    torch.testing.assert_close(found.loss, expected.loss)
    assert_close_states(spoilt, clean)
    (found.loss + found.quantized[:3].square().sum()).backward()
    assert given.grad.isfinite().all()
    assert not given.grad[3].any()
    for name, parameter in spoilt.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), f"the gradient of {name} is not finite"


@pytest.mark.parametrize("size", [1e12, 1e20, 1e30])
@pytest.mark.parametrize("dim", [6, 24])  # searched in two ways
def test_a_finite_latent_has_a_code_however_large_it_is(dim, size):
    """What is -1 for a token that is there cannot be told from padding."""
    for distance in ("euclidean", "cosine"):
        quantizer = started(partial(VectorQuantizer, dim, 16, update="ema", distance=distance))
        z = size * latents(1, 20, dim).sign()
        assert (quantizer.eval()(z).indices >= 0).all()
        quantizer.train()(z)
        assert quantizer.codebook.isfinite().all()


def test_a_double_that_no_float_can_hold_is_not_finite():
    """It becomes an infinity where the search begins, and goes the way of a NaN."""
    quantizer = made(partial(VectorQuantizer, 6, 8, update="ema", init="normal"))
    clean = copy.deepcopy(quantizer)
    z = latents(20, 6).double()
    clean(z)
    found = quantizer(torch.cat([z, torch.full((1, 6), 1e300, dtype=torch.float64)]))
    assert int(found.indices[-1]) == -1
    assert found.loss.isfinite()
    assert_close_states(quantizer, clean)


COMPILING = """
import copy, json, torch
from makes import MAKES
from functools import partial
from torch import nn
from provq.quantizers import VectorQuantizer

class Encode(nn.Module):
    def __init__(self, quantizer):
        super().__init__()
        self.quantizer = quantizer
    def forward(self, z):
        return self.quantizer.assign(self.quantizer.enter(z))

class Decode(Encode):
    def forward(self, indices):
        return self.quantizer.lookup(indices)

def latents(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + seed))

wrong = {}
options = dict(update="ema", revive_below=0.5, codebook_dim=4, heads=2, estimator="rotation")
makes = {"gradient": partial(VectorQuantizer, 6, 16), "ema": partial(VectorQuantizer, 6, 16, **options)}
for name, make in makes.items():
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = make()
    twin = copy.deepcopy(plain)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for step in range(5):  # the first founds the codebook; evaluation comes in between
        plain.train(step != 3), twin.train(step != 3)
        z = latents(4, 64, 6, seed=step)
        mask = latents(4, 64, seed=100 + step) > -1
        torch.manual_seed(step)
        expected = plain(z, mask)
        torch.manual_seed(step)
        found = compiled(z, mask)
        if not torch.equal(found.indices, expected.indices) or not torch.allclose(found.loss, expected.loss):
            wrong[name] = f"step {step} differs once compiled"
    if not all(torch.allclose(value, twin.state_dict()[key]) for key, value in plain.state_dict().items()):
        wrong[name] = "the compiled one learns another codebook"

# A compiler that generates code may fold what a test for NaN is made of.
quantizer = MAKES["finite-scalar"]()
z = latents(6, 4)
z[1, 0], z[2, 1] = float("nan"), float("inf")
found, expected = torch.compile(quantizer, fullgraph=True)(z), quantizer(z)
if not torch.equal(found.indices, expected.indices) or not expected.indices[1:3].eq(-1).all():
    wrong["not finite"] = f"indices are {found.indices.tolist()} once compiled, {expected.indices.tolist()} before"

for name in EXPORTED:
    torch.manual_seed(0)
    quantizer = MAKES[name]()
    quantizer(latents(4, 128, quantizer.dim, seed=9))
    quantizer.eval()
    z, other = latents(3, 8, quantizer.dim), latents(5, 8, quantizer.dim, seed=1)
    encode, decode = Encode(quantizer), Decode(quantizer)
    indices = encode(other)
    indices[0, 0] = -1
    shapes = ({0: torch.export.Dim("batch")},)
    try:
        exported = torch.export.export(encode, (z,), dynamic_shapes=shapes).module()
        if not torch.equal(exported(other), encode(other)):
            wrong[name] = "encode differs once exported"
        exported = torch.export.export(decode, (encode(z),), dynamic_shapes=shapes).module()
        if not torch.allclose(exported(indices), decode(indices), rtol=1e-5, atol=1e-6):
            wrong[name] = "decode differs once exported"
    except Exception as error:
        wrong[name] = f"{type(error).__name__}: {error}"[:500]
print(json.dumps(wrong))
"""
EXPORTED = ("vector-ema-heads-projected", "simvq", "residual-ema-rounds", "multi-scale")


@pytest.fixture(scope="module")
def wrong_once_compiled(root):
    return in_fresh_process(f"EXPORTED = {EXPORTED}{COMPILING}", root)


@pytest.mark.parametrize("name", ["gradient", "ema"])
def test_training_and_evaluation_compile_to_full_graphs(name, wrong_once_compiled):
    """Full-graph compilation of VectorQuantize fails, even in evaluation, on a branch that asks the data."""
    assert wrong_once_compiled.get(name) is None


def test_a_token_that_is_not_finite_stays_out_of_generated_code_too(wrong_once_compiled):
    """A comparison that holds for numbers alone, such as x * 0 == 0, is folded away by the default compiler."""
    assert wrong_once_compiled.get("not finite") is None


@pytest.mark.parametrize("name", EXPORTED)
def test_encoding_and_decoding_export_for_any_number_of_items(name, wrong_once_compiled):
    """torch.export of VectorQuantize fails, on the same branch."""
    assert wrong_once_compiled.get(name) is None


AUTOCAST = {
    "euclidean": partial(VectorQuantizer, 64, 4096, init="normal"),
    "cosine": partial(VectorQuantizer, 64, 4096, init="normal", distance="cosine"),
    "ema": partial(VectorQuantizer, 64, 4096, init="normal", update="ema"),
    "projected": partial(VectorQuantizer, 64, 4096, init="normal", codebook_dim=32),
    "heads": partial(VectorQuantizer, 64, 4096, init="normal", heads=2),
    "simvq": partial(SimVQ, 64, 4096),
    "simvq-mlp": partial(SimVQ, 64, 4096, map="mlp"),
    "index-backprop": partial(IndexBackpropQuantizer, 64, 4096, init="normal"),
    "residual": lambda: ResidualQuantizer([VectorQuantizer(64, 4096, init="normal") for _ in range(2)], dim=48),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("make", AUTOCAST.values(), ids=AUTOCAST)
def test_autocast_changes_no_index_on_a_cpu(make, training):
    """Only CUDA's autocast is switched off around the search: elsewhere 1.0 % of indices change, of SimVQ's 0.5 %."""
    quantizer = made(make).train(training)
    z = latents(512, quantizer.dim)
    expected = copy.deepcopy(quantizer)(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = quantizer(z)
        encoded = quantizer.eval().assign(quantizer.enter(z)) if quantizer.codebook_parameters() else None
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.quantized, expected.quantized)
    assert torch.equal(found.loss, expected.loss)
    assert encoded is None or found.indices.shape == encoded.shape


def test_these_data_would_show_a_search_under_autocast():
    quantizer = made(AUTOCAST["euclidean"])
    z = latents(512, 64)
    half_norms = quantizer.codebook.detach().square().sum(1) / 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        indices = (z @ quantizer.codebook.detach().T - half_norms).argmax(1)
    assert not torch.equal(indices, quantizer(z).indices)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "half"])
def test_a_cast_loses_no_small_step_of_moving_averages(dtype):
    """A cast module keeps its averages in 16 bits: changes below about 0.2 % a step vanish."""
    quantizer = made(partial(VectorQuantizer, 1, 2, update="ema", init="normal", decay=0.9999))
    quantizer.codebook.copy_(torch.tensor([[1.0], [-1.0]]))
    quantizer.to(dtype)
    assert {buffer.dtype for buffer in quantizer.buffers() if buffer.is_floating_point()} == {torch.float32}
    quantizer(torch.full((1, 1), 2.0, dtype=dtype))
    # A count of 1 and a token at 2: 0.9999 * 1 + 0.0001 * 2.
    assert float(quantizer.codebook[0, 0]) - 1 == pytest.approx(1e-4, rel=1e-2)
    assert float(quantizer.usage[0]) - 0.5 == pytest.approx(0.5e-4, rel=1e-2)


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_a_cast_reaches_no_statistics_however_deep_they_lie(make):
    """A cast reaches what wrapped codebooks count."""
    quantizer = started(make)
    before = {name: buffer.clone() for name, buffer in quantizer.named_buffers() if buffer.is_floating_point()}
    quantizer.bfloat16()
    for name, buffer in quantizer.named_buffers():
        of, _, last = name.rpartition(".")
        if last in ("hardness", *quantizer.get_submodule(of).float32_buffers):
            assert buffer.dtype == torch.float32, f"{name} is {buffer.dtype}"
            assert torch.equal(buffer, before[name]), f"{name} lost digits"
        assert last != "ema_counts" or buffer.dtype == torch.float32


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_the_index_of_nothing_is_not_the_last_code(make):
    """`get_codes_from_indices(-1)` is the last code."""
    quantizer = started(make)
    indices = quantizer(latents(2, 9, quantizer.dim)).indices
    before = quantizer.lookup(indices).detach()
    absent = torch.full_like(indices, -1)
    assert not quantizer.lookup(absent).any()
    if not isinstance(quantizer, MultiScaleQuantizer):  # whose tokens are spread over their neighbours
        absent[1] = indices[1]
        torch.testing.assert_close(quantizer.lookup(absent)[1].detach(), before[1])
        assert not quantizer.lookup(absent)[0].any()


@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-38, 1e-30, 1e-20])
@pytest.mark.parametrize(
    "make",
    [
        partial(VectorQuantizer, 6, 8, init="normal", estimator="rotation"),
        partial(VectorQuantizer, 6, 8, init="normal", estimator="rotation", update="ema", heads=3),
        partial(VectorQuantizer, 6, 8, init="normal", estimator="rotation", distance="cosine"),
        partial(SimVQ, 6, 8, estimator="rotation"),
        lambda: ResidualQuantizer([VectorQuantizer(6, 8, init="normal")], rounds=2, estimator="rotation"),
        lambda: MultiScaleQuantizer(VectorQuantizer(6, 8, init="normal"), (2, 1), estimator="rotation"),
    ],
    ids=["plain", "heads", "cosine", "simvq", "residual", "multi-scale"],
)
def test_the_rotation_gives_the_code_of_a_zero_vector_too(make, size):
    """The rotation trick turns a zero vector to zero: training and evaluation differ, above all on padding."""
    quantizer = made(make)
    hard = copy.deepcopy(quantizer).eval()
    z = torch.full((1, 4, 6), size).requires_grad_()
    quantized, indices, _ = quantizer(z)
    expected = hard(z)
    assert torch.equal(indices, expected.indices)
    torch.testing.assert_close(quantized, expected.quantized)
    torch.testing.assert_close(quantized, hard.lookup(indices))
    assert (quantized.norm(dim=-1) > 0.01).all()
    quantized.sum().backward()
    assert z.grad.isfinite().all()


def test_a_codebook_has_one_owner_either_the_optimizer_or_the_moving_averages():
    """With orthogonal_reg_weight the codebook is a parameter that moving averages overwrite."""
    with pytest.raises(UsageError, match=r"orthogonal_weight.*update='gradient'.*'ema'"):
        VectorQuantizer(6, 8, update="ema", orthogonal_weight=1.0)
    for options in ({"orthogonal_weight": 1.0}, {"diversity_weight": 1.0, "update": "ema"}, {"update": "ema"}, {}):
        quantizer = VectorQuantizer(6, 8, **options)
        is_averaged = "ema_counts" in dict(quantizer.named_buffers())
        assert is_averaged == (options.get("update") == "ema")
        assert isinstance(quantizer.codebook, nn.Parameter) != is_averaged


@pytest.mark.parametrize(
    "options",
    [
        {"distance": "cosine"},
        {"update": "gradient"},
        {"update": "ema"},
        {"estimator": "rotation"},
        {"sampling_temperature": 0.1},
        {"orthogonal_weight": 0.1},
        {"diversity_weight": 0.1},
        {"bridge_blocks": 1},
        {"heads": 2},
        {"codebook_dim": 2},
        {"revive_below": 0.1},
        {"init": "normal"},
        {"update": "gradient", "distance": "cosine"},
        {"update": "gradient", "distance": "cosine", "estimator": "rotation", "heads": 2},
    ],
    ids=str,
)
def test_an_option_is_valid_by_itself_and_the_codebook_learns(options):
    """learnable_codebook=True dies on an assertion by itself and is not supported with cosine codes."""
    quantizer = made(partial(VectorQuantizer, 6, 16, **{"init": "uniform", "decay": 0.9, **options}))
    places = 3 * latents(8, 6, seed=5)
    if list(quantizer.parameters()):
        optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.002 if quantizer.bridge else 0.05)
    errors = []
    for seed in range(60):
        z = places.repeat(10, 1) + 0.1 * latents(80, 6, seed=seed)
        loss = quantizer(z).loss
        errors.append(relative_error(quantizer, z))
        if list(quantizer.parameters()):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert errors[-1] < 0.7 * max(errors[0], 0.05)


@torch.no_grad()
def relative_error(quantizer, z):
    u = quantizer.enter(z)
    return float((u - quantizer.codes(quantizer.assign(u))).square().sum() / (u - u.mean(0)).square().sum())


NEEDS_DATA = {
    "vector": partial(VectorQuantizer, 4, 64),
    "ema": partial(VectorQuantizer, 4, 64, update="ema"),
    "cosine": partial(VectorQuantizer, 4, 64, distance="cosine"),
    "index-backprop": partial(IndexBackpropQuantizer, 4, 64),
}


@pytest.mark.parametrize("make", NEEDS_DATA.values(), ids=NEEDS_DATA)
def test_fewer_vectors_than_codes_are_refused_and_not_repeated(make):
    """k-means on fewer vectors than codes gives 11 different codes of 64."""
    quantizer = made(make)
    before = frozen_copy(quantizer.state_dict())
    with pytest.raises(UserError, match=r"codebook_size=64, vectors=63\b"):
        quantizer(latents(63, 4))
    assert_same(quantizer.state_dict(), before)


@pytest.mark.parametrize(("number", "copies"), [(64, 1), (70, 1), (1000, 1), (100, 3)])
@pytest.mark.parametrize("make", NEEDS_DATA.values(), ids=NEEDS_DATA)
def test_k_means_settles_on_different_codes(make, number, copies):
    """k-means leaves many codes in one place."""
    quantizer = made(make)
    quantizer(latents(number, 4).repeat(copies, 1))
    assert len(quantizer.table().detach().unique(dim=0)) == 64


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_evaluation_settles_nothing_and_training_still_does(make):
    """k-means also runs on a batch of evaluation."""
    quantizer = made(make).eval()
    before, awaited = frozen_copy(quantizer.state_dict()), quantizer.awaits_latents
    quantizer(latents(4, 128, quantizer.dim))
    assert_same(quantizer.state_dict(), before)
    assert quantizer.awaits_latents == awaited


MEMORY = """
import json, torch
from functools import partial
from provq.quantizers import IndexBackpropQuantizer, VectorQuantizer

def resident(field):
    for line in open("/proc/self/status"):
        if line.startswith(field):
            return int(line.split()[1]) / 1024

def mebibytes(work):
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before

def training_step(quantizer, z):
    quantized, _, loss = quantizer(z)
    (quantized.square().sum() + loss).backward()

N, K = 8192, 16384
vector = partial(VectorQuantizer, codebook_size=K, init="normal")
MAKES = {
    "gradient": vector,
    "ema, revived": partial(vector, update="ema", revive_below=0.5),
    "diversity": partial(vector, diversity_weight=0.1),
    "sampled": partial(vector, sampling_temperature=0.1),
    "index-backprop": partial(IndexBackpropQuantizer, codebook_size=K, init="normal"),
}
found = {}
for dim in (8, 24):  # searched in two ways
    z = torch.randn(N, dim, requires_grad=True)
    small = torch.randn(64, dim, requires_grad=True)
    for name, make in MAKES.items():
        if dim == 24 and name != "gradient":
            continue
        quantizer = make(dim)
        training_step(quantizer, small)  # what is loaded once is not of the step
        found[f"{name}, {dim}, training"] = mebibytes(lambda: training_step(quantizer, z))
        quantizer.eval()
        if name == "gradient":
            found[f"{name}, {dim}, evaluation"] = mebibytes(lambda: quantizer(z))
found["a table"] = mebibytes(lambda: torch.cdist(z, quantizer.table()).argmin(1))
print(json.dumps(found))
"""


def test_no_table_of_vectors_by_codes_is_kept(root):
    """Evaluation builds such a table of int64 that nobody reads, training several: here 3 GiB at the peak."""
    found = in_fresh_process(MEMORY, root)
    of_table = 8192 * 16384 * 4 / 2**20
    assert found.pop("a table") > 0.9 * of_table, "this measure would not see such a table"
    assert {name: mebibytes for name, mebibytes in found.items() if mebibytes > 120} == {}


@pytest.mark.parametrize("make", LEARNED.values(), ids=LEARNED)
def test_the_codebook_loss_is_taken_of_the_code_and_trains_it(make):
    """Taken of the straight-through output, it never reaches the codebook (showlab/Olaf-World#8)."""
    quantizer = started(make)
    for part in quantizer.modules():
        if hasattr(part, "commitment_weight"):
            part.commitment_weight = 0.0
    parameters = quantizer.codebook_parameters()
    if not parameters:
        assert any("ema_counts" in name for name, _ in quantizer.named_buffers())
        return
    z = latents(4, 128, quantizer.dim) + 2  # away from where the codes were settled
    has_bridge = any("bridge" in name for name, _ in quantizer.named_parameters())
    optimizer = torch.optim.Adam(parameters, lr=0.002 if has_bridge else 0.05)
    errors = []
    for _ in range(12):
        loss = quantizer(z).loss
        errors.append(relative_error(quantizer, z))
        optimizer.zero_grad()
        loss.backward()
        assert any(parameter.grad.any() for parameter in parameters)
        optimizer.step()
    assert errors[-1] < 0.8 * errors[0]


def test_a_revived_code_forgets_the_averages_of_the_dead_one():
    """A revived code keeps its old sum and count, and goes back to where it died (#45)."""
    quantizer = made(partial(VectorQuantizer, 1, 2, update="ema", init="normal", decay=0.5, revive_below=0.9))
    quantizer.codebook.copy_(torch.tensor([[0.0], [1000.0]]))
    quantizer.ema_counts.copy_(torch.tensor([4.0, 4.0]))
    quantizer.usage.copy_(torch.tensor([0.9, 0.1]))
    quantizer(torch.tensor([[-0.5], [0.5]]))
    revived = float(quantizer.codebook[1, 0])
    assert abs(revived) == 0.5
    assert float(quantizer.ema_counts[1]) == 1
    assert float(quantizer.usage[1]) == 0.5
    quantizer.steady()
    for _ in range(2):  # tokens on the new place alone: the code stays there
        quantizer(torch.full((3, 1), revived))
        assert float(quantizer.codebook[1, 0]) == revived
    count = float(quantizer.ema_counts[1])
    assert count == 0.5 * (0.5 * 1 + 0.5 * 3) + 0.5 * 3
    quantizer(torch.full((2, 1), 1.25 * revived))
    expected = (0.5 * count * revived + 0.5 * 2 * 1.25 * revived) / (0.5 * count + 0.5 * 2)
    assert float(quantizer.codebook[1, 0]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_a_shared_codebook_gives_the_same_codes_in_training_and_evaluation(update):
    """With one codebook for all stages training and evaluation take different codes (#162, #163)."""
    torch.manual_seed(0)
    stage = VectorQuantizer(4, 16, update=update, decay=0.8)
    quantizer = ResidualQuantizer([stage], rounds=2)
    parameters = list(quantizer.parameters()) or [torch.zeros((), requires_grad=True)]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    for seed in range(5):
        z = latents(200, 4, seed=seed)
        if seed:  # after k-means
            expected = copy.deepcopy(quantizer).eval()(z)
        found = quantizer(z)
        if seed:
            assert torch.equal(found.indices, expected.indices)
            torch.testing.assert_close(found.quantized, expected.quantized)
        if update == "gradient":
            found.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    table, found = stage.table().detach().clone(), quantizer(z)
    torch.testing.assert_close(found.quantized, table[found.indices].sum(1))


@pytest.mark.parametrize("cast", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("levels", [[2], [3], [8, 5, 5, 2], [7, 16], [255, 256]], ids=str)
def test_extreme_latents_stay_on_the_grid(levels, cast):
    """Indices of FSQ leave their range, in 16 bits above all (#207, #240)."""
    quantizer = FiniteScalarQuantizer(levels).to(cast)
    sizes = torch.tensor([1e6, -1e6, 60_000, -60_000, 20, -20, 1, 0]).clamp(-65_000, 65_000)
    z = sizes[:, None].expand(-1, len(levels)).to(cast)
    wide = torch.tensor([1e6, -1e6, 3e38, -3e38])[:, None].expand(-1, len(levels))
    for given in (z, wide) if cast != torch.float16 else (z,):
        for training in (True, False):
            quantized, indices, _ = quantizer.train(training)(given.to(cast))
            assert int(indices.min()) >= 0
            assert int(indices.max()) < math.prod(levels)
            assert torch.equal(indices[:2], torch.tensor([math.prod(levels) - 1, 0]))
            assert torch.equal(quantized, quantizer.lookup(indices).to(cast))


@pytest.mark.parametrize("options", [{}, {"update": "ema"}, {"heads": 2}, {"codebook_dim": 3}], ids=str)
def test_no_two_codes_are_revived_from_one_vector(options):
    """Vectors are drawn with replacement, so that two dead codes come to lie in one place."""
    quantizer = made(partial(VectorQuantizer, 6, 64, init="normal", decay=0.0, revive_below=0.9, **options))
    with torch.no_grad():
        quantizer.codebook.add_(1000.0)  # all but one or two codes are dead
    z = latents(66, 6)
    vectors = {tuple(row) for row in quantizer.enter(z).detach().reshape(-1, quantizer.codebook_dim).tolist()}
    quantizer(z)
    revived = [tuple(row) for row in quantizer.codebook.detach().tolist() if max(row) < 100]
    assert len(revived) >= 60
    assert len(set(revived)) == len(revived)
    assert options.get("update") == "ema" or set(revived) <= vectors


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_every_quantizer_loads_its_own_state_strictly(make):
    """Some options give a module that cannot load what it saved (#61)."""
    quantizer = started(make)
    state = quantizer.state_dict()
    restored = made(make, seed=1)
    restored.load_state_dict(state, strict=True)
    assert_same(restored.state_dict(), state)
    assert not restored.awaits_latents
    for name in state:
        with pytest.raises(RuntimeError, match=name.replace(".", r"\.")):
            made(make).load_state_dict({key: value for key, value in state.items() if key != name})
    with pytest.raises(RuntimeError, match="initted"):
        made(make).load_state_dict({**state, "initted": torch.ones(1)})
    # What follows is the same too.
    z = latents(4, 128, quantizer.dim)
    torch.manual_seed(1)
    expected = quantizer(z)
    torch.manual_seed(1)
    for mine, its in zip(restored(z), expected, strict=True):
        assert torch.equal(mine, its)
    assert_same(restored.state_dict(), quantizer.state_dict())


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_a_frozen_codebook_is_frozen_everywhere(distance):
    """A frozen codebook still moves: by averages, by expiry, by the optimizer or at the start (#42, #68, #93, #209)."""
    made_frozen = partial(VectorQuantizer, 6, 16, update="frozen", init="normal", distance=distance, codebook_dim=4)
    model = nn.Sequential(nn.Linear(6, 6), made(made_frozen))
    quantizer = model[1]
    before = frozen_copy(codebook_of(quantizer))
    assert quantizer.codebook_parameters() == []
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    projection = quantizer.project_in.weight.detach().clone()
    for seed in range(5):
        quantized, _, loss = model(latents(100, 6, seed=seed))
        optimizer.zero_grad()
        (quantized.square().sum() + loss).backward()
        optimizer.step()
    assert not torch.equal(quantizer.project_in.weight, projection), "nothing was trained at all"
    assert hand_over(model, lambda: model(latents(100, 6))) == []
    quantizer.found(latents(100, 4))
    quantizer.found_on_next_batch()
    assert not quantizer.awaits_latents
    model(latents(100, 6))
    quantizer.rest(True)
    quantizer.rest(False)
    model(latents(100, 6))
    assert_same(codebook_of(quantizer), before)


@pytest.mark.parametrize("hardness", [0.0, 1.0])
@pytest.mark.parametrize("start", [made, started], ids=["first batch", "later batch"])
@pytest.mark.parametrize("make", LEARNED.values(), ids=LEARNED)
def test_a_codebook_that_rests_is_frozen_everywhere(make, start, hardness):
    """A codebook that is told to wait learns on by another way: averages, revival, a penalty, the output's gradient."""
    quantizer = start(make)
    quantizer.rest(True)
    quantizer.hardness.fill_(hardness)
    before = frozen_copy(codebook_of(quantizer))
    parameters = list(quantizer.parameters()) or [torch.zeros((), requires_grad=True)]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.0)
    for seed in range(3):
        z = latents(4, 128, quantizer.dim, seed=seed).requires_grad_()
        quantized, _, loss = quantizer(z)
        optimizer.zero_grad()
        (quantized.square().sum() + loss).backward()
        optimizer.step()
    assert not quantizer.awaits_latents
    assert_same(codebook_of(quantizer), before)
    # And it is not dead: once it is woken, it learns.
    quantizer.rest(False)
    quantized, _, loss = quantizer(latents(4, 128, quantizer.dim, seed=7) + 1)
    optimizer.zero_grad()
    (quantized.square().sum() + loss + parameters[0].sum() * 0).backward()
    optimizer.step()
    after = codebook_of(quantizer)
    assert any(not torch.equal(after[name], value) for name, value in before.items())


def test_every_kind_of_quantizer_is_among_those_that_are_tested():
    from provq.quantizers import KINDS

    tested = {type(make()) for make in MAKES.values()} | {Continuous}
    assert tested == set(KINDS.values())
    assert all(issubclass(kind, Quantizer) for kind in tested)
