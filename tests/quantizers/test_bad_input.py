"""A user's mistake is a ValueError that names the argument, what it was and what was expected, and it changes nothing.

What is given is never clamped, cut or rounded in silence.
"""

import math
import re
from functools import partial

import jaxtyping
import pytest
import torch
from makes import MAKES
from torch import nn

from provq import Tokenizer
from provq.errors import UsageError, UserError
from provq.networks import Decoder, Encoder
from provq.quantizers import (
    KINDS,
    Continuous,
    FiniteScalarQuantizer,
    GroupedQuantizer,
    IndexBackpropQuantizer,
    LookupFreeQuantizer,
    MultiScaleQuantizer,
    Quantizer,
    ResidualQuantizer,
    SimVQ,
    VectorQuantizer,
)
from provq.spec import build


@pytest.fixture(autouse=True)
def as_users_run_it():
    """Without the checks of shapes that other tests put around every function, which would complain first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def latents(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + seed))


def made(make, seed=0):
    torch.manual_seed(seed)
    return make()


def started(make):
    """A quantizer whose codebook has settled on a first batch."""
    quantizer = made(make)
    quantizer(latents(4, 128, quantizer.dim, seed=9))
    return quantizer


def state_of(quantizer):
    """All that a quantizer and its members remember, saved or not."""
    parts = [part for part in quantizer.modules() if isinstance(part, Quantizer)]
    tensors = {name: tensor.detach().clone() for name, tensor in (*quantizer.named_parameters(), *named(quantizer))}
    return tensors, [(part.awaits_latents, part.training) for part in parts]


def named(quantizer):
    return [(name, buffer) for name, buffer in quantizer.named_buffers() if not name.endswith("hardness")]


def refused(quantizer, words, work):
    """The error of what a quantizer refuses, which holds these words and leaves the quantizer as it was."""
    tensors, flags = state_of(quantizer)
    with pytest.raises(ValueError) as caught:
        work()
    message = str(caught.value)
    assert isinstance(caught.value, UserError), f"{type(caught.value).__name__}: {message}"
    for word in words:
        assert re.search(rf"(?<!\w){re.escape(word)}(?!\w)", message), f"{word!r} is missing in: {message}"
    after, flags_after = state_of(quantizer)
    assert flags_after == flags, f"afterwards it awaits latents or is in another mode: {message}"
    for name, value in tensors.items():
        assert torch.equal(after[name], value), f"{name} moved: {message}"
    return message


@pytest.mark.parametrize("make", [*MAKES.values(), partial(Continuous, 6)], ids=[*MAKES, "continuous"])
def test_latents_of_another_length_are_named_with_it(make):
    for quantizer in (made(make), started(make), started(make).eval()):
        name = type(quantizer).__name__
        for shape in ((4, 128, quantizer.dim + 1), (2, quantizer.dim, quantizer.dim + 3), (quantizer.dim - 1,), (0, 1)):
            words = (name, "z", f"dim={quantizer.dim}", str(tuple(shape)).strip("()"))
            refused(quantizer, words, partial(quantizer, torch.zeros(shape)))
        message = refused(quantizer, (name, "z", f"dim={quantizer.dim}"), partial(quantizer, torch.zeros(())))
        assert "()" in message


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64], ids=str)
@pytest.mark.parametrize("make", [MAKES["vector"], partial(Continuous, 6)], ids=["vector", "continuous"])
def test_latents_that_are_no_real_numbers_are_not_rounded_to_what_came_in(make, dtype):
    quantizer = made(make)
    words = (type(quantizer).__name__, "z", str(dtype))
    refused(quantizer, words, partial(quantizer, torch.ones(4, 128, quantizer.dim).to(dtype)))


@pytest.mark.parametrize("make", [*MAKES.values(), partial(Continuous, 6)], ids=[*MAKES, "continuous"])
def test_a_mask_of_another_shape_or_type_is_named_with_it(make):
    for quantizer in (made(make), started(make)):
        z = latents(4, 128, quantizer.dim)
        name = type(quantizer).__name__
        for shape in ((128,), (4,), (4, 127), (4, 1), (4, 128, 1), (128, 4), z.shape, ()):
            words = (name, "mask", "4, 128", "bool")
            message = refused(quantizer, words, partial(quantizer, z, torch.ones(shape, dtype=torch.bool)))
            assert str(tuple(shape)) in message
        for dtype in (torch.float32, torch.int64, torch.uint8):
            words = (name, "mask", str(dtype), "bool")
            refused(quantizer, words, partial(quantizer, z, torch.ones(4, 128, dtype=dtype)))


def of_codebook(quantizer, codebook, index):
    """Indices that are all 0 but one of one codebook."""
    several = len(quantizer.codebook_sizes) > 1
    indices = torch.zeros((2, 3, len(quantizer.codebook_sizes)) if several else (2, 3), dtype=torch.int64)
    indices[(1, 2, codebook) if several else (1, 2)] = index
    return indices


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_an_index_beyond_its_codebook_is_named_with_the_sizes(make):
    quantizer = started(make)
    for mode in (quantizer.train(), quantizer.eval()):
        for codebook, size in enumerate(quantizer.codebook_sizes):
            for index in (-2, size, 2**40, -(2**63)):
                words = (type(mode).__name__, "indices", str(size), "-1", str(index).lstrip("-"))
                refused(mode, words, partial(mode.lookup, of_codebook(mode, codebook, index)))
            for index in (-1, 0, size - 1):
                mode.lookup(of_codebook(mode, codebook, index))


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_another_number_of_codebooks_is_named(make):
    quantizer = started(make)
    number = len(quantizer.codebook_sizes)
    if number == 1:
        return
    for shape in ((2, 3, number + 1), (2, number - 1), (2, 3, 1), (2, 0), ()):
        words = (type(quantizer).__name__, "indices", str(number), str(tuple(shape)).strip("()"))
        if shape == (number,):
            continue
        refused(quantizer, [word for word in words if word], partial(quantizer.lookup, torch.zeros(shape).long()))


# Each looks its codes up in its own way.
LOOKUPS = ("vector", "simvq", "index-backprop", "finite-scalar", "lookup-free", "residual", "grouped", "multi-scale")


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32], ids=str)
@pytest.mark.parametrize("name", LOOKUPS)
def test_short_whole_numbers_as_tokens_are_stored_in_are_indices_too(name, dtype):
    quantizer = started(MAKES[name]).eval()
    indices = quantizer(latents(2, 9, quantizer.dim)).indices
    torch.testing.assert_close(quantizer.lookup(indices.to(dtype)), quantizer.lookup(indices))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool], ids=str)
@pytest.mark.parametrize("name", LOOKUPS)
def test_indices_that_are_no_whole_numbers_are_refused(name, dtype):
    quantizer = started(MAKES[name]).eval()
    indices = quantizer(latents(2, 9, quantizer.dim)).indices
    words = (type(quantizer).__name__, "indices", str(dtype))
    refused(quantizer, words, partial(quantizer.lookup, indices.to(dtype)))


SETTLED = {
    "vector": partial(VectorQuantizer, 6, 64),
    "ema": partial(VectorQuantizer, 6, 64, update="ema"),
    "cosine": partial(VectorQuantizer, 6, 64, distance="cosine"),
    "heads": partial(VectorQuantizer, 6, 64, heads=2),
    "bridge": partial(VectorQuantizer, 6, 64, bridge_blocks=1),
    "normal": partial(VectorQuantizer, 6, 64, init="normal"),
    "index-backprop": partial(IndexBackpropQuantizer, 6, 64),
    "simvq": partial(SimVQ, 6, 64),
    "residual": lambda: ResidualQuantizer([VectorQuantizer(6, 8), VectorQuantizer(6, 64)]),
    "residual-fixed-first": lambda: ResidualQuantizer([FiniteScalarQuantizer([3] * 6), VectorQuantizer(6, 64)]),
    "grouped": lambda: GroupedQuantizer([VectorQuantizer(3, 8), VectorQuantizer(3, 64)]),
    "nested": lambda: GroupedQuantizer([ResidualQuantizer([VectorQuantizer(3, 8), SimVQ(3, 64)]), SimVQ(3, 8)]),
    "multi-scale": lambda: MultiScaleQuantizer(VectorQuantizer(6, 64), (4, 1)),
}
SETTLED_BY_BATCH = [name for name in SETTLED if name not in ("normal", "simvq", "nested")]


@pytest.mark.parametrize("name", SETTLED_BY_BATCH)
def test_a_first_batch_with_fewer_latents_than_codes_is_named_with_both_numbers(name):
    quantizer = made(SETTLED[name])
    message = refused(quantizer, ("64", "codes"), partial(quantizer, latents(1, 20, 6)))
    number = {"heads": 40, "multi-scale": 25}.get(name, 20)
    assert re.search(rf"\b{number}\b", message), message
    quantizer(latents(1, 128, 6))  # and a larger one is taken
    assert not quantizer.awaits_latents


@pytest.mark.parametrize("start", [made, started], ids=["first", "settled before"])
@pytest.mark.parametrize("name", SETTLED)
def test_founding_on_fewer_latents_than_codes_is_named_with_both_numbers(name, start):
    quantizer = start(SETTLED[name])
    number = {"heads": 40}.get(name, 20)
    refused(quantizer, ("64", "codes", str(number)), partial(quantizer.found, latents(20, 6)))
    refused(quantizer, ("found",), partial(quantizer.found, latents(0, 6)))


@pytest.mark.parametrize("name", SETTLED)
def test_founding_on_latents_of_another_length_is_refused(name):
    quantizer = started(SETTLED[name])
    for length in (5, 7, 9):  # three is the length of a head
        refused(quantizer, ("6", str(length)), partial(quantizer.found, latents(128, length)))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", SETTLED)
def test_founding_on_latents_that_are_not_finite_is_refused(name, bad):
    quantizer = started(SETTLED[name])
    z = latents(128, 6)
    z[5, 2] = bad
    refused(quantizer, ("finite",), partial(quantizer.found, z))


@pytest.mark.parametrize(
    "codes", [torch.zeros(63, 6), torch.zeros(64, 5), torch.zeros(6), torch.full((64, 6), math.nan)], ids=str
)
def test_codes_that_do_not_fit_are_not_loaded(codes):
    quantizer = made(partial(VectorQuantizer, 6, 64, update="frozen", init="normal"))
    message = refused(quantizer, ("codes", "finite", "64, 6"), partial(quantizer.load_codebook, codes))
    assert str(tuple(codes.shape)) in message


@pytest.mark.parametrize(
    ("kind", "required"),
    [
        ("vector", {"dim": 6, "codebook_size": 8}),
        ("simvq", {"dim": 6, "codebook_size": 8}),
        ("index_backprop", {"dim": 6, "codebook_size": 8}),
        ("finite_scalar", {"levels": [3, 3]}),
        ("lookup_free", {"bits": 4}),
        ("residual", {"stages": [VectorQuantizer(6, 8)]}),
        ("grouped", {"groups": [VectorQuantizer(6, 8)]}),
        ("multi_scale", {"quantizer": VectorQuantizer(6, 8), "windows": [2, 1]}),
        ("continuous", {"dim": 6}),
    ],
    ids=list(KINDS),
)
def test_an_option_that_is_misspelt_or_missing_is_named_with_the_nearest_word(kind, required):
    known = [name for name in KINDS[kind].__init__.__wrapped__.__annotations__ if name != "return"]
    for name in known:
        misspelt = f"{name[:-1]}x" if len(name) < 5 else f"{name[:2]}{name[3:]}"
        with pytest.raises(UsageError, match=rf"^quantizer\.{misspelt}: unknown key.*(did you mean|known:).*{name}"):
            build({"kind": kind, **required, misspelt: 3}, KINDS, where="quantizer")
        with pytest.raises(TypeError, match=misspelt):  # from Python it is the mistake of a call
            KINDS[kind](**required, **{misspelt: 3})
    for name in required:
        with pytest.raises(UsageError, match=f"^quantizer: .*{name!r} is missing"):
            build(
                {"kind": kind, **{key: value for key, value in required.items() if key != name}},
                KINDS,
                where="quantizer",
            )
    with pytest.raises(UsageError, match=f"^quantizer.kind: unknown kind '{kind[:-1]}'; did you mean '{kind}'"):
        build({"kind": kind[:-1], **required}, KINDS, where="quantizer")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": 4}, ("heads=4", "dim=6", "codebook_dim")),
        ({"update": "ema", "orthogonal_weight": 0.1}, ("orthogonal_weight", "update='gradient'", "'ema'")),
        ({"update": "ema", "bridge_blocks": 1}, ("bridge_blocks", "update='gradient'", "'ema'")),
        ({"update": "frozen", "init": "normal", "bridge_blocks": 1}, ("bridge_blocks", "'frozen'")),
        ({"bridge_blocks": 1, "revive_below": 0.1}, ("bridge_blocks", "revive_below")),
        ({"update": "frozen"}, ("update='frozen'", "init='normal'")),
        ({"update": "frozen", "init": "normal", "revive_below": 0.1}, ("update='frozen'", "revive_below=0")),
        ({"sampling_temperature": 1.0, "estimator": "rotation"}, ("sampling_temperature", "estimator")),
    ],
    ids=str,
)
def test_options_that_contradict_each_other_are_named_together(options, words):
    with pytest.raises(UsageError) as caught:
        VectorQuantizer(6, 8, **options)
    for word in ("VectorQuantizer", *words):
        assert word in str(caught.value)
    with pytest.raises(UsageError, match="^quantizer: VectorQuantizer"):
        build({"kind": "vector", "dim": 6, "codebook_size": 8, **options}, KINDS, where="quantizer")


def vector(**options):
    return VectorQuantizer(6, 8, **options)


TWICE = vector()
PROJECTING = vector(codebook_dim=3)
OF_SEVERAL = {
    "ResidualQuantizer": (ResidualQuantizer, "stages"),
    "GroupedQuantizer": (GroupedQuantizer, "groups"),
    "MultiScaleQuantizer": (lambda given: MultiScaleQuantizer(given, (2, 1)), "quantizer"),
}


@pytest.mark.parametrize("owner", OF_SEVERAL)
def test_members_that_cannot_be_are_named_with_their_place(owner):
    make, argument = OF_SEVERAL[owner]

    def refuses(members, *words):
        with pytest.raises(UsageError) as caught:
            make(members if owner != "MultiScaleQuantizer" else members[-1])
        for word in (owner, argument, *words):
            assert word in str(caught.value)

    if owner == "MultiScaleQuantizer":
        with pytest.raises(UsageError, match="quantizer"):
            make([])
    else:
        refuses([], "at least one")
        refuses([TWICE, vector(), TWICE], "[2]", "twice")
        refuses(TWICE, argument)
    refuses([vector(), PROJECTING], "projects", "dim=6", "3")
    refuses([vector(), Continuous(6)], "Continuous", "no tokens")
    for wrong in (nn.Linear(6, 6), "vector", 3, None):
        refuses([vector(), wrong], "uantizer, got", "Linear" if isinstance(wrong, nn.Module) else str(wrong))


@pytest.mark.parametrize("owner", ["ResidualQuantizer", "GroupedQuantizer"])
def test_a_member_that_stands_somewhere_deeper_too_is_named(owner):
    """One codebook in two places would be settled and averaged twice a step."""
    make, argument = OF_SEVERAL[owner]
    with pytest.raises(UsageError, match=rf"{owner}: {argument}\[1\].*twice"):
        make([ResidualQuantizer([TWICE]), TWICE])


def test_stages_of_a_residual_must_be_of_one_length_and_add_up():
    with pytest.raises(UsageError, match=r"ResidualQuantizer: stages must have one dim, got \[5, 6\]"):
        ResidualQuantizer([vector(), VectorQuantizer(5, 8)])
    on_sphere = [
        vector(distance="cosine"),
        IndexBackpropQuantizer(6, 8, distance="cosine"),
        LookupFreeQuantizer(6, spherical=True),
        GroupedQuantizer([VectorQuantizer(3, 8), VectorQuantizer(3, 8, distance="cosine")]),
    ]
    for stage in on_sphere:
        with pytest.raises(UsageError, match=rf"ResidualQuantizer: stages\[1\].*{type(stage).__name__}.*add up"):
            ResidualQuantizer([vector(), stage])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ResidualQuantizer([vector()], rounds=0), ("ResidualQuantizer.rounds", "1", "0")),
        (lambda: ResidualQuantizer([vector()], dropout=1.1), ("ResidualQuantizer.dropout", "1", "1.1")),
        (lambda: ResidualQuantizer([vector()], stagger=1.0), ("ResidualQuantizer.stagger", "1", "1.0")),
        (lambda: GroupedQuantizer([vector()], stagger=-0.1), ("GroupedQuantizer.stagger", "0", "-0.1")),
        (lambda: GroupedQuantizer([vector()], dim=0), ("GroupedQuantizer.dim", "1", "0")),
        (lambda: MultiScaleQuantizer(vector(), ()), ("MultiScaleQuantizer.windows", "at least 1")),
        (lambda: MultiScaleQuantizer(vector(), (2, 0.5)), ("MultiScaleQuantizer.windows.1", "1", "0.5")),
        (lambda: MultiScaleQuantizer(vector(), 2), ("MultiScaleQuantizer.windows", "tuple", "2")),
        (lambda: LookupFreeQuantizer(32), ("LookupFreeQuantizer.bits", "31", "32")),
        (lambda: LookupFreeQuantizer(4, temperature=0.0), ("LookupFreeQuantizer.temperature", "0", "0.0")),
        (lambda: SimVQ(6, 8, map="mpl"), ("SimVQ.map", "'mpl'", "did you mean 'mlp'")),
        (lambda: IndexBackpropQuantizer(6, 0), ("IndexBackpropQuantizer.codebook_size", "1", "0")),
    ],
)
def test_a_value_out_of_bounds_is_named_with_the_bound(make, words):
    with pytest.raises(UsageError) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


class Given(Encoder):
    """An encoder that passes latents on as they are."""

    def __init__(self, dim):
        super().__init__()
        self.dim, self.reduction = dim, 1

    def forward(self, items):
        return items


class Taken(Decoder):
    """A decoder that passes latents on as they are."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, latents):
        return latents


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_a_latent_that_is_not_finite_stays_in_sight_and_has_no_token(make, bad):
    quantizer = started(make)
    tokenizer = Tokenizer(Given(quantizer.dim), quantizer, Taken(quantizer.dim))
    z = latents(2, 9, quantizer.dim)
    z[1, 3, 0] = bad
    refused(quantizer, ("finite", "tokens"), partial(tokenizer.encode, z))
    quantized, indices, loss = quantizer.eval()(z)
    assert (indices[1, 3] == -1).all()
    torch.testing.assert_close(quantized[1, 3], z[1, 3], rtol=0, atol=0, equal_nan=True)
    there = torch.ones(2, 9, dtype=torch.bool)
    there[1, 3] = False
    assert quantized[there].isfinite().all()
    assert loss.isfinite()
    # A batch of such latents alone teaches nothing.
    tensors, flags = state_of(quantizer.train())
    assert float(quantizer(torch.full((4, 128, quantizer.dim), bad)).loss.detach()) == 0
    after, flags_after = state_of(quantizer)
    assert flags_after == flags
    for name, value in tensors.items():
        assert torch.equal(after[name], value), f"{name} moved"


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
def test_a_tokenizer_decodes_no_token_that_is_not_there(make):
    quantizer = started(make).eval()
    tokenizer = Tokenizer(Given(quantizer.dim), quantizer, Taken(quantizer.dim))
    several = len(quantizer.codebook_sizes) > 1
    for codebook, size in enumerate(quantizer.codebook_sizes):
        for index in (-2, size):
            words = ("token" if not several else "codebooks", str(size))
            refused(quantizer, words, partial(tokenizer.decode, of_codebook(quantizer, codebook, index)))
