"""Codebooks of other libraries: the same tokens and values as the module that they are from.

vector-quantize-pytorch is imported. Of moshi and encodec the quantizers alone are, without the rest of those packages,
where they are installed (`pip install --no-deps moshi encodec`); what moshi's does is held against float64 as well.
taming-transformers and LlamaGen are on no index: their formula stands here, in float64.
"""

import importlib
import importlib.util
import re
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from provq import from_state
from provq.errors import UserError
from provq.quantizers import GroupedQuantizer, ResidualQuantizer, SimVQ, VectorQuantizer
from provq.quantizers.base import Quantizer

DIM, CODES = 8, 12


def latents(dim=DIM, seed=0):
    """Five clumps, so that some codes are used more than others."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, dim, generator=torch.Generator().manual_seed(99))
    clump = torch.randint(0, 5, (6, 40), generator=generator)
    return centres[clump] + 0.6 * torch.randn(6, 40, dim, generator=generator)


def trained(kind, **options):
    """A module of vector-quantize-pytorch after a few steps."""
    library = pytest.importorskip("vector_quantize_pytorch")
    torch.manual_seed(0)
    module = getattr(library, kind)(rotation_trick=False, **options)
    parameters = list(module.parameters())
    optimizer = torch.optim.Adam(parameters, lr=0.02) if parameters else None
    for seed in range(6):
        z = latents(options["dim"], seed)
        values, _, loss = module(z)
        if optimizer is not None:
            ((values - z).square().mean() + loss.sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
    return module


def without_gradients(module):
    """The state as `state_dict` gives it, but of its own memory, as if it came from a file."""
    return {key: value.clone() for key, value in module.state_dict().items()}


def assert_same(made, module, z, indices_of=lambda indices: indices):
    module.eval()
    with torch.no_grad():
        values, indices = module(z)[:2]
        found = made(z)
    assert not made.training
    assert indices.unique().numel() > 4, "a test in which all tokens are the same says nothing"
    assert torch.equal(found.indices, indices_of(indices))
    torch.testing.assert_close(found.quantized, values, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(made.lookup(found.indices), values, rtol=1e-5, atol=1e-5)


VECTORS = {
    "ema": {},
    "ema started by k-means": {"kmeans_init": True},
    "ema with codes replaced": {"threshold_ema_dead_code": 2},
    "cosine": {"use_cosine_sim": True},
    "projected": {"codebook_dim": 3},
    "cosine, projected": {"codebook_dim": 3, "use_cosine_sim": True},
    "shared heads": {"heads": 2, "codebook_dim": 4},
    "shared heads, projected": {"heads": 3, "codebook_dim": 3},
    "heads apart": {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True},
    "heads apart, projected": {"heads": 3, "codebook_dim": 3, "separate_codebook_per_head": True},
    "heads apart, cosine": {"heads": 2, "codebook_dim": 4, "separate_codebook_per_head": True, "use_cosine_sim": True},
    "learnable": {"learnable_codebook": True, "ema_update": False},
    "learnable, projected": {"learnable_codebook": True, "ema_update": False, "codebook_dim": 3},
}


def of_vectors(options, state):
    return from_state(
        state, heads=options.get("heads", 1), distance="cosine" if options.get("use_cosine_sim") else "euclidean"
    )


def codebooks(quantizer):
    return torch.stack([part.table() for part in quantizer.modules() if isinstance(part, VectorQuantizer)])


@pytest.mark.parametrize("options", VECTORS.values(), ids=VECTORS)
def test_a_vector_quantize_makes_the_same_tokens_and_learns_on_in_the_same_way(options):
    module = trained("VectorQuantize", dim=DIM, codebook_size=CODES, **options)
    # A file of safetensors holds keys in the order of the alphabet.
    made = of_vectors(options, dict(sorted(without_gradients(module).items())))
    assert_same(made, module, latents(seed=100))
    apart = options.get("separate_codebook_per_head", False)
    assert isinstance(made, GroupedQuantizer if apart else VectorQuantizer)
    parts = made.groups if apart else (made,)
    learnable = "learnable_codebook" in options
    assert {part.update for part in parts} == {"gradient" if learnable else "ema"}
    if learnable:
        assert torch.equal(codebooks(made), module._codebook.embed)
        return
    # Replaced codes are drawn at random, so only what came before is compared there.
    module._codebook.has_dead_code_replacement = False
    for part in parts:
        part.decay = 0.8
    before = codebooks(made)
    with torch.no_grad():
        module.train()(latents(seed=101))
        made.train()(latents(seed=101))
    assert (codebooks(made) - before).abs().max() > 1e-3, "nothing moved"
    torch.testing.assert_close(codebooks(made), module._codebook.embed, rtol=0, atol=1e-4)


RESIDUALS = {
    "apart": {},
    "shared": {"shared_codebook": True},
    "projected": {"codebook_dim": 5},
    "of several sizes": {"codebook_size": (CODES, 7, 5)},
    "learnable": {"learnable_codebook": True, "ema_update": False},
    "learnable, shared": {"learnable_codebook": True, "ema_update": False, "shared_codebook": True},
}


@pytest.mark.parametrize("options", RESIDUALS.values(), ids=RESIDUALS)
def test_a_residual_vq_makes_the_same_tokens_and_learns_on_in_the_same_way(options):
    module = trained("ResidualVQ", **{"dim": DIM, "num_quantizers": 3, "codebook_size": CODES, **options})
    made = from_state(without_gradients(module))
    assert isinstance(made, ResidualQuantizer)
    assert (len(made.stages), made.rounds) == ((1, 3) if "shared_codebook" in options else (3, 1))
    assert_same(made, module, latents(seed=100))
    if "learnable_codebook" in options:
        assert {stage.update for stage in made.stages} == {"gradient"}
        return
    for stage in made.stages:
        stage.decay = 0.8
    with torch.no_grad():
        module.train()(latents(seed=101))
        made.train()(latents(seed=101))
    for layer, stage in zip(module.layers, made.stages, strict=False):
        torch.testing.assert_close(stage.table(), layer._codebook.embed[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"codebook_dim": 3}], ids=["plain", "projected"])
def test_a_grouped_residual_vq_makes_the_same_tokens(options):
    module = trained("GroupedResidualVQ", dim=DIM, groups=2, num_quantizers=2, codebook_size=CODES, **options)
    made = from_state(without_gradients(module))
    assert isinstance(made, GroupedQuantizer)
    assert_same(made, module, latents(seed=100), lambda groups: torch.cat(list(groups), -1))


@pytest.mark.parametrize("options", [{}, {"frozen_codebook_dim": 5}], ids=["square", "shorter"])
def test_a_simvq_makes_the_same_tokens_and_learns_by_the_same_map(options):
    module = trained("SimVQ", dim=DIM, codebook_size=CODES, **options)
    made = from_state(without_gradients(module))
    assert isinstance(made, SimVQ)
    assert_same(made, module, latents(seed=100))
    z = latents(seed=101)
    module.train()(z)[2].backward()
    made.train()(z).loss.backward()
    width = options.get("frozen_codebook_dim", DIM)
    torch.testing.assert_close(made.learned.weight.grad[:, :width], module.code_transform.weight.grad)
    assert not made.learned.weight.grad[:, width:].any()


def test_a_residual_simvq_makes_the_same_tokens():
    module = trained("ResidualSimVQ", dim=DIM, num_quantizers=3, codebook_size=CODES)
    assert_same(from_state(without_gradients(module)), module, latents(seed=100))


def test_the_quantizer_is_found_in_the_state_of_a_model_and_shares_no_memory_with_it():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, DIM))
            self.vq = trained("ResidualVQ", dim=DIM, num_quantizers=2, codebook_size=CODES, codebook_dim=5)
            # Named like the convolutions of moshi, and not the quantizer's.
            self.input_proj = nn.Linear(3, 3)

    model = Model()
    made = from_state(model.state_dict())
    assert_same(made, model.vq, latents(seed=100))
    before = made(latents()).quantized
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.zero_()
    assert torch.equal(made(latents()).quantized, before)


def table(rows=CODES, dim=DIM, seed=0):
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def nearest(z, codes):
    """argmin of z^2 + e^2 - 2 z e, as taming-transformers and LlamaGen write it, in float64."""
    return (np.square(z).sum(-1)[..., None] + np.square(codes).sum(-1) - 2 * z @ codes.T).argmin(-1)


@pytest.mark.parametrize("prefix", ["", "quantize."])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_a_vqgan_makes_the_tokens_of_its_formula(prefix, distance):
    weight = table()
    state = {
        "encoder.conv_in.weight": torch.zeros(4, 3, 3, 3),
        "quant_conv.weight": torch.zeros(DIM, 4, 1, 1),
        f"{prefix}embedding.weight": weight,
        f"{prefix}codebook_used": torch.zeros(65536),
        "decoder.conv_out.bias": torch.zeros(3),
    }
    z = latents()
    made = from_state(state, distance=distance)
    codes, vectors = weight.double().numpy(), z.double().numpy()
    if distance == "cosine":
        codes = codes / np.linalg.norm(codes, axis=-1, keepdims=True)
        vectors = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    indices = nearest(vectors, codes)
    found = made(z)
    assert made.update == "gradient"
    assert np.array_equal(found.indices, indices)
    np.testing.assert_allclose(found.quantized.detach(), codes[indices], rtol=1e-5, atol=1e-6)


def test_the_averages_of_taming_go_on_by_their_formula():
    """taming's EMAVectorQuantizer: sums over Laplace-smoothed counts, which stand beside the weight."""
    rng = np.random.default_rng(0)
    counts = rng.uniform(1, 9, CODES)
    sums = counts[:, None] * table().double().numpy()

    def means(sums, counts):
        smoothed = (counts + 1e-5) / (counts.sum() + CODES * 1e-5) * counts.sum()
        return sums / smoothed[:, None]

    state = {"weight": means(sums, counts), "cluster_size": counts, "embed_avg": sums}
    made = from_state({f"quantize.embedding.{name}": torch.tensor(value).float() for name, value in state.items()})
    assert made.update == "ema"
    z = latents()
    vectors = z.reshape(-1, DIM).double().numpy()
    indices = nearest(vectors, means(sums, counts))
    assert np.array_equal(made.train()(z).indices.flatten(), indices)
    ones = np.eye(CODES)[indices]
    after = means(0.99 * sums + 0.01 * ones.T @ vectors, 0.99 * counts + 0.01 * ones.sum(0))
    np.testing.assert_allclose(made.codebook, after, rtol=1e-4, atol=1e-5)


def quantization_of(package, monkeypatch):
    """`package.quantization` alone: the rest of the package wants audio and models, which no codebook needs."""
    pytest.importorskip("einops")
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed")
    hollow = types.ModuleType(package)
    hollow.__path__ = list(spec.submodule_search_locations)
    monkeypatch.setitem(sys.modules, package, hollow)
    try:
        return importlib.import_module(f"{package}.quantization")
    finally:
        for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
            monkeypatch.delitem(sys.modules, name)


def channels_last(module, *arguments):
    """A module of audio, which takes (batch, channels, time), as one with channels last; codes likewise."""

    def call(z):
        found = module(z.movedim(-1, 1), *arguments)
        values = found.x if hasattr(found, "x") else found.quantized
        # encodec puts codebooks first, moshi second.
        axis = 1 if hasattr(found, "x") else 0
        return values.movedim(1, -1), found.codes.movedim(axis, -1).squeeze(-1)

    call.eval = module.eval
    return call


MOSHI = {
    "plain": {"dimension": DIM},
    "projected": {"dimension": 5, "input_dimension": DIM, "output_dimension": DIM},
    "projected to the same length": {"dimension": DIM, "force_projection": True},
    "one stage": {"dimension": DIM, "n_q": 1},
}


@pytest.mark.parametrize("options", MOSHI.values(), ids=MOSHI)
def test_a_residual_quantizer_of_moshi_makes_the_same_tokens_and_learns_on(options, monkeypatch):
    quantization = quantization_of("moshi", monkeypatch)
    torch.manual_seed(0)
    module = quantization.ResidualVectorQuantizer(**{"n_q": 3, "bins": CODES, **options}).requires_grad_(False)
    run = channels_last(module, 12)
    for seed in range(8):
        run(latents(seed=seed))
    made = from_state(without_gradients(module))
    assert_same(made, run, latents(seed=100))
    module.train()
    for layer in module.vq.layers:
        layer._codebook._next_unused_check = 1000
    with torch.no_grad():
        run(latents(seed=101))
        made.train()(latents(seed=101))
    for layer, stage in zip(module.vq.layers, made.stages, strict=True):
        width = layer.embedding.shape[1]
        torch.testing.assert_close(stage.table()[:, :width], layer.embedding, rtol=0, atol=1e-4)
        assert not stage.table()[:, width:].any()


# The last is the shape of Mimi: the codes of both parts together are as long as latents.
@pytest.mark.parametrize("dimension", [3, 5, DIM, DIM // 2])
def test_a_split_residual_quantizer_of_moshi_makes_the_same_tokens(dimension, monkeypatch):
    quantization = quantization_of("moshi", monkeypatch)
    torch.manual_seed(0)
    module = quantization.SplitResidualVectorQuantizer(
        n_q=4, dimension=dimension, input_dimension=DIM, output_dimension=DIM, bins=CODES
    ).requires_grad_(False)
    run = channels_last(module, 12)
    for seed in range(8):
        run(latents(seed=seed))
    state = {f"quantizer.{key}": value for key, value in without_gradients(module).items()}
    assert_same(from_state(state | {"encoder.weight": torch.ones(2, 2)}), run, latents(seed=100))


def test_a_residual_quantizer_of_encodec_makes_the_same_tokens_and_learns_on(monkeypatch):
    quantization = quantization_of("encodec", monkeypatch)
    torch.manual_seed(0)
    module = quantization.ResidualVectorQuantizer(dimension=DIM, n_q=3, bins=CODES)
    run = channels_last(module, 12)
    for seed in range(8):
        run(latents(seed=seed))
    made = from_state(without_gradients(module))
    assert {stage.update for stage in made.stages} == {"ema"}
    assert_same(made, run, latents(seed=100))
    module.train()
    with torch.no_grad():
        run(latents(seed=101))
        made.train()(latents(seed=101))
    for layer, stage in zip(module.vq.layers, made.stages, strict=True):
        torch.testing.assert_close(stage.table(), layer.codebook, rtol=0, atol=1e-4)


def moshi_state(prefix, stages, dim, seed):
    rng = np.random.default_rng(seed)
    state = {
        f"{prefix}input_proj.weight": rng.normal(size=(dim, DIM, 1)),
        f"{prefix}output_proj.weight": rng.normal(size=(DIM, dim, 1)),
    }
    for stage in range(stages):
        place = f"{prefix}vq.layers.{stage}._codebook."
        usage = rng.uniform(0, 4, CODES)
        usage[0] = 0.0  # its code is the sum over epsilon
        state[place + "_initialized"] = np.ones(1)
        state[place + "cluster_usage"] = usage
        state[place + "embedding_sum"] = rng.normal(size=(CODES, dim)) * np.maximum(usage, 1e-5)[:, None]
    return {key: torch.tensor(value).float() for key, value in state.items()}


def by_hand(state, prefix, stages, z):
    """moshi.quantization.vq in float64: what it makes of latents with channels last."""
    state = {key: value.double().numpy() for key, value in state.items()}
    rest = z @ state[f"{prefix}input_proj.weight"][..., 0].T
    total, found = 0.0, []
    for stage in range(stages):
        place = f"{prefix}vq.layers.{stage}._codebook."
        codes = state[place + "embedding_sum"] / state[place + "cluster_usage"].clip(1e-5)[:, None]
        indices = nearest(rest, codes)
        found.append(indices)
        rest, total = rest - codes[indices], total + codes[indices]
    return total @ state[f"{prefix}output_proj.weight"][..., 0].T, np.stack(found, -1)


@pytest.mark.parametrize("names", [{}, {"embedding_sum": "embed_sum", "cluster_usage": "cluster_size"}], ids=str)
@pytest.mark.parametrize("dim", [3, DIM // 2])
def test_the_sum_of_two_residual_quantizers_is_that_of_the_formula(dim, names):
    parts = {"rvq_first.": 1, "rvq_rest.": 3}
    state = {}
    for seed, (prefix, stages) in enumerate(parts.items()):
        state |= moshi_state(prefix, stages, dim, seed)
    z = latents()
    wanted = [by_hand(state, prefix, stages, z.double().numpy()) for prefix, stages in parts.items()]
    renamed = dict(state)
    for new, old in names.items():
        renamed = {key.replace(new, old): value for key, value in renamed.items()}
    made = from_state(renamed)
    found = made(z)
    assert np.array_equal(found.indices, np.concatenate([indices for _, indices in wanted], -1))
    np.testing.assert_allclose(found.quantized.detach(), sum(values for values, _ in wanted), rtol=1e-4, atol=1e-4)
    baked = made.baked().eval()(z)
    assert torch.equal(baked.quantized, found.quantized)
    assert torch.equal(baked.indices, found.indices)


def ema(**changes):
    counts = torch.linspace(1, 5, CODES)
    state = {"initted": torch.tensor(True), "cluster_size": counts[None], "embed": table()[None]}
    state["embed_avg"] = state["embed"] * counts[None, :, None]
    state = {f"_codebook.{key}": value for key, value in state.items()}
    state |= {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in state.items() if value is not None}


def infinite(shape):
    values = torch.ones(shape)
    values.view(-1)[3] = torch.inf
    return values


def on_sphere():
    state = ema()
    means = state["_codebook.embed"]
    return state | {"_codebook.embed": nn.functional.normalize(means, dim=-1)}


def residual(**changes):
    return {f"layers.0.{key}": value for key, value in ema().items()} | {
        key.replace("__", "."): value for key, value in changes.items()
    }


WRONG = {
    "no keys": ({}, {}, "no quantizer that is known.*of 0 keys: none"),
    "unknown": (
        {"a.weight": table(), "b": table()},
        {},
        "looked for .*embedding.weight; the first of 2 keys: a.weight",
    ),
    "twice": (
        {"quantize.embedding.weight": table(), "ema.quantize.embedding.weight": table()},
        {},
        "2 quantizers, under the prefixes 'ema.quantize.', 'quantize.'",
    ),
    "flat codes": ({"embedding.weight": torch.ones(5)}, {}, r"embedding.weight: expected .* got shape \(5,\)"),
    "codes not finite": (
        {"embedding.weight": infinite((5, 3))},
        {},
        "embedding.weight holds values that are not finite",
    ),
    "remapped": ({"embedding.weight": table(), "used": torch.arange(3)}, {}, "used numbers the codes anew"),
    "counts of another number": (ema(_codebook__cluster_size=torch.ones(1, 4)), {}, r"cluster_size: .* got \(1, 4\)"),
    "sums not finite": (ema(_codebook__embed_avg=infinite((1, CODES, DIM))), {}, "embed_avg holds values that are not"),
    "not started": (ema(_codebook__initted=torch.tensor(False)), {}, "initted is false"),
    "affine": (ema(_codebook__codebook_mean=torch.ones(1, 1, DIM)), {}, "codebook_mean changes what codes are"),
    "normalized after projecting": (
        ema(**{"project_in__0.weight": torch.ones(DIM, 4), "project_in__1.weight": torch.ones(DIM)}),
        {},
        "project_in must be one linear map",
    ),
    "heads not given": (
        ema(project_in__weight=torch.ones(2 * DIM, 5), project_out__weight=torch.ones(5, 2 * DIM)),
        {},
        r"project_in.weight has shape \(16, 5\), expected 8 rows for codes of length 8 and heads=1",
    ),
    "maps that do not meet": (
        ema(project_in__weight=torch.ones(DIM, 5), project_out__weight=torch.ones(6, DIM)),
        {},
        "project_in.weight and project_out.weight must lead",
    ),
    "other heads": (
        {key: torch.cat([value, value]) if value.ndim else value for key, value in ema().items()},
        {"heads": 3},
        "for each of 2 heads, got heads=3",
    ),
    "cosine of plain codes": (ema(), {"distance": "cosine"}, "12 codes of other lengths than 1.* distance='euclidean'"),
    "plain distance of directions": (on_sphere(), {}, "directions of means, not means; give distance='cosine'"),
    "a gap": ({f"layers.1.{key}": value for key, value in ema().items()}, {}, "layers. must be numbered from 0"),
    "directions in stages": (
        {f"layers.0.{key}": value for key, value in on_sphere().items()},
        {},
        "layers.0._codebook.embed holds directions of means, .* not for residual stages",
    ),
    "not started, of moshi": (
        moshi_state("", 1, 3, 0) | {"vq.layers.0._codebook._initialized": torch.zeros(1)},
        {},
        "_initialized is false",
    ),
    "heads in stages": (residual(), {"heads": 2}, "residual stages, which provq has with heads=1"),
    "cosine in stages": (residual(), {"distance": "cosine"}, "residual stages, .* got 1 and 'cosine'"),
    "made codebooks": (residual(**{"mlps__0.proj_in.weight": table()}), {}, "mlps makes a codebook out of codes"),
    "stages that project": (residual(layers__0__project_in__weight=table()), {}, "layers.0. projects by itself"),
    "sums without counts": ({"_codebook.embedding_sum": table()}, {}, "_codebook.embed is missing"),
    "a map with layers": (
        {"frozen_codebook": table(), "code_transform.0.weight": table(DIM), "code_transform.2.weight": table(DIM)},
        {},
        "code_transform must be one linear map without bias.* got 0.weight, 2.weight",
    ),
    "longer frozen vectors": (
        {"frozen_codebook": table(), "code_transform.weight": table(5)},
        {},
        "longer vectors than",
    ),
    "half a split": (
        moshi_state("rvq_first.", 1, 3, 0),
        {},
        "need an input_proj.*give the two parts one after the other",
    ),
    "channels that change": (
        moshi_state("", 1, 3, 0) | {"output_proj.weight": torch.ones(5, 3, 1)},
        {},
        r"input_proj.weight and output_proj.weight must lead .* \(3, 8\) and \(5, 3\)",
    ),
}


@pytest.mark.parametrize(("state", "arguments", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_read_is_told(state, arguments, message):
    with pytest.raises(UserError, match=message) as raised:
        from_state(state, **arguments)
    assert re.match("from_state: ", str(raised.value))


def test_the_states_of_the_tests_of_errors_are_right_but_for_the_error():
    for state in (ema(), residual(), moshi_state("", 2, 3, 0)):
        assert isinstance(from_state(state), Quantizer)
