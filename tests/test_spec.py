"""A mapping becomes an object and a mapping again, and whatever is wrong with it is said in one sentence."""

import sys
from typing import Annotated, Literal

import pytest
import torch
from pydantic import Field
from torch import nn

from provq.curriculum import Adaptive, Constant, Cosine, Deferred, Learned, Linear, Piecewise, kinds
from provq.errors import UsageError, nearest
from provq.networks import (
    DECODERS,
    ENCODERS,
    ConvolutionalDecoder,
    ConvolutionalEncoder,
    GeometricAttentionEncoder,
    LocalFrameEncoder,
    StructureDecoder,
    VitDecoder,
    VitEncoder,
    VqganDecoder,
    VqganEncoder,
)
from provq.quantizers import (
    KINDS,
    Continuous,
    FiniteScalarQuantizer,
    GroupedQuantizer,
    IndexBackpropQuantizer,
    LookupFreeQuantizer,
    MultiScaleQuantizer,
    ResidualQuantizer,
    SimVQ,
    VectorQuantizer,
)
from provq.spec import build, checked, describe, fitting


class Tool:
    """The base class of a table of kinds."""


class Saw(Tool):
    @checked
    def __init__(
        self,
        teeth: Annotated[int, Field(ge=1)],
        *,
        length: Annotated[float, Field(gt=0, le=2)] = 0.5,
        material: Literal["steel", "bronze"] = "steel",
        sharp: bool = True,
        spares: tuple[int, ...] = (),
        owner: str | None = None,
    ) -> None:
        self.teeth, self.length, self.material = teeth, length, material
        self.sharp, self.spares, self.owner = sharp, spares, owner


class Hammer(Tool):
    @checked
    def __init__(self, weight: float = 1.0, handle: nn.Module | None = None) -> None:
        if weight == 13:
            raise UsageError("Hammer: nobody lifts 13")
        self.weight, self.handle = weight, handle


TOOLS = {"saw": Saw, "hammer": Hammer}


def made(local=False, **spec):
    return build(spec, TOOLS, where="tool", local=local)


THINGS = {
    "vector": (VectorQuantizer(3, 8), KINDS),
    "vector, all options": (
        VectorQuantizer(
            3,
            8,
            distance="cosine",
            update="ema",
            decay=0.9,
            commitment_weight=2.0,
            commitment_follows_hardness=False,
            codebook_weight=0.0,
            estimator="rotation",
            init="uniform",
            revive_below=0.25,
        ),
        KINDS,
    ),
    "vector, heads and a bridge": (VectorQuantizer(4, 8, heads=2, codebook_dim=3, bridge_blocks=1), KINDS),
    "simvq": (SimVQ(3, 8, codebook_dim=2, map="mlp"), KINDS),
    "index backprop": (IndexBackpropQuantizer(3, 8, temperature=0.5), KINDS),
    "finite scalar": (FiniteScalarQuantizer([8, 5, 5]), KINDS),
    "finite scalar, projected": (FiniteScalarQuantizer([8, 5, 5], dim=6), KINDS),
    "lookup-free": (LookupFreeQuantizer(4, dim=6, spherical=True), KINDS),
    "residual": (ResidualQuantizer([VectorQuantizer(3, 8), SimVQ(3, 4)], dim=5, dropout=0.5, stagger=0.25), KINDS),
    "grouped, a group residual": (
        GroupedQuantizer([ResidualQuantizer([VectorQuantizer(3, 8)], rounds=2), LookupFreeQuantizer(2)]),
        KINDS,
    ),
    "multi-scale": (MultiScaleQuantizer(VectorQuantizer(3, 8, update="ema"), [4, 1.5, 1]), KINDS),
    "continuous": (Continuous(7), KINDS),
    "encoder": (ConvolutionalEncoder(3, width=8, depth=2, downsampling=4, channels=1), ENCODERS),
    "decoder": (ConvolutionalDecoder(3, width=16, depth=0, downsampling=2, channels=5), DECODERS),
    "vqgan encoder": (
        VqganEncoder(3, width=8, multipliers=(1, 2), depth=1, latent_width=4, checkpoint_activations=True),
        ENCODERS,
    ),
    "vqgan decoder": (VqganDecoder(3, width=8, multipliers=(1, 2), depth=2, latent_width=4, channels=1), DECODERS),
    "vit encoder": (VitEncoder(3, width=8, depth=1, heads=2, patch=4, checkpoint_activations=True), ENCODERS),
    "vit decoder": (VitDecoder(3, width=8, depth=2, heads=1, patch=2, channels=1), DECODERS),
    "local frame encoder": (LocalFrameEncoder(3, width=8, depth=1, neighbours=4, heads=2), ENCODERS),
    "geometric attention encoder": (GeometricAttentionEncoder(3, width=8, heads=2, depth=1, neighbours=4), ENCODERS),
    "structure decoder": (StructureDecoder(3, width=8, depth=1, heads=2), DECODERS),
    "constant": (Constant(0.25), kinds.KINDS),
    "linear": (Linear(0.1, 0.2), kinds.KINDS),
    "cosine": (Cosine(0.3, 1.0), kinds.KINDS),
    "deferred": (Deferred(0.7), kinds.KINDS),
    "adaptive": (Adaptive(0.2, 0.3, 0.9, ends_by="water_filling", gain=2.0), kinds.KINDS),
    "learned": (Learned(0.2, 0.9, price=2.0), kinds.KINDS),
    "piecewise": (Piecewise(((0.1, 0.0), (0.5, 0.3), (0.9, 1.0))), kinds.KINDS),
}


def plain(value):
    """As a YAML or JSON file gives it back: with lists only."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def test_every_kind_is_held_to_the_round_trip():
    tables = [KINDS, ENCODERS, DECODERS, kinds.KINDS]
    assert {type(thing) for thing, _ in THINGS.values()} == {kind for table in tables for kind in table.values()}


@pytest.mark.parametrize(("thing", "table"), THINGS.values(), ids=THINGS)
def test_a_description_builds_an_equal_thing(thing, table):
    spec = describe(thing, table)
    assert spec["kind"] in table
    for again in (build(spec, table, where="x"), build(plain(spec), table, where="x")):
        assert type(again) is type(thing)
        assert describe(again, table) == spec
        if isinstance(thing, nn.Module):
            shapes = [{name: value.shape for name, value in one.state_dict().items()} for one in (thing, again)]
            assert shapes[0] == shapes[1]
        else:
            assert [again(step / 20) for step in range(21)] == [thing(step / 20) for step in range(21)]


def test_values_arrive_as_they_were_written():
    saw = made(kind="saw", teeth=3, length=1, material="bronze", sharp=False, spares=[1, 2], owner="me")
    assert (saw.teeth, saw.length, saw.material, saw.sharp, saw.spares, saw.owner) == (
        3,
        1.0,
        "bronze",
        False,
        (1, 2),
        "me",
    )
    assert made(kind="saw", teeth=3).length == 0.5
    assert made(kind="saw", teeth=3, owner=None).owner is None
    assert isinstance(saw.length, float)


def test_what_is_wrong_inside_is_told_with_its_place():
    for stages, complaint in (
        (
            [{"kind": "vector", "dim": 2, "codebook_size": 4}, {"kind": "vectr"}],
            r"q\.stages\.1\.kind: unknown kind 'vectr'",
        ),
        ([{"kind": "vector", "dim": 2, "codebook_size": 0}], r"q\.stages\.0\.codebook_size: input should be greater"),
        ([{"kind": "vector", "dim": 2, "codebook_sise": 4}], r"q\.stages\.0\.codebook_sise: unknown key; did you mean"),
        ([], "q: ResidualQuantizer: stages must hold at least one quantizer"),
        (3, "q.stages: input should be a valid tuple, got 3"),
        (["vector"], r"q\.stages\.0: input should be an instance of Quantizer, got 'vector'"),
    ):
        with pytest.raises(UsageError, match=complaint):
            build({"kind": "residual", "stages": stages}, KINDS, where="q")


WRONG = {
    "unknown kind": ({"kind": "hamer"}, "tool.kind: unknown kind 'hamer'; did you mean 'hammer'?"),
    "distant kind": ({"kind": "zzzzz"}, "tool.kind: unknown kind 'zzzzz'; known: hammer, saw"),
    "number as kind": ({"kind": 3}, "tool.kind: expected a name, got 3; known: hammer, saw"),
    "list as kind": ({"kind": ["saw"]}, "tool.kind: expected a name, got ['saw']; known: hammer, saw"),
    "missing kind": ({"teeth": 3}, "tool: the key 'kind' is missing; known kinds: hammer, saw"),
    "unknown key": ({"kind": "saw", "teeth": 3, "lenght": 1}, "tool.lenght: unknown key; did you mean 'length'?"),
    "distant key": ({"kind": "hammer", "qqq": 1}, "tool.qqq: unknown key; known: handle, weight"),
    "self as key": ({"kind": "hammer", "self": 1}, "tool.self: unknown key; known: handle, weight"),
    "missing key": ({"kind": "saw"}, "tool: the key 'teeth' is missing"),
    "text": ({"kind": "saw", "teeth": "3"}, "tool.teeth: input should be a valid integer, got '3'"),
    "float": ({"kind": "saw", "teeth": 3.0}, "tool.teeth: input should be a valid integer, got 3.0"),
    "bool as int": ({"kind": "saw", "teeth": True}, "tool.teeth: input should be a valid integer, got True"),
    "bool as float": (
        {"kind": "saw", "teeth": 3, "length": True},
        "tool.length: input should be a valid number, got True",
    ),
    "int as bool": ({"kind": "saw", "teeth": 3, "sharp": 1}, "tool.sharp: input should be a valid boolean, got 1"),
    "none": ({"kind": "saw", "teeth": None}, "tool.teeth: input should be a valid integer, got None"),
    "too small": ({"kind": "saw", "teeth": 0}, "tool.teeth: input should be greater than or equal to 1, got 0"),
    "too large": ({"kind": "saw", "teeth": 3, "length": 2.5}, "tool.length: input should be less than or equal to 2"),
    "literal": (
        {"kind": "saw", "teeth": 3, "material": "steal"},
        "tool.material: input should be 'steel' or 'bronze', got 'steal'; did you mean 'steel'?",
    ),
    "inside a list": (
        {"kind": "saw", "teeth": 3, "spares": [1, "2"]},
        "tool.spares.1: input should be a valid integer, got '2'",
    ),
    "rule of its own": ({"kind": "hammer", "weight": 13}, "tool: Hammer: nobody lifts 13"),
}


@pytest.mark.parametrize(("spec", "sentence"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_with_its_place(spec, sentence):
    with pytest.raises(UsageError) as caught:
        build(spec, TOOLS, where="tool")
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize("key", [3, True, None])
def test_a_key_that_is_no_text_is_unknown(key):
    with pytest.raises(UsageError, match=rf"tool.{key}: unknown key; known: handle, weight"):
        build({"kind": "hammer", key: 1}, TOOLS, where="tool")


@pytest.mark.parametrize("spec", [None, "saw", ["kind", "saw"], 3])
def test_what_is_no_mapping_is_refused(spec):
    with pytest.raises(UsageError, match="tool: expected a mapping with the key 'kind', got "):
        build(spec, TOOLS, where="tool")


def test_what_the_surroundings_give_may_not_be_written_down():
    assert build({"kind": "saw"}, TOOLS, where="tool", teeth=5).teeth == 5
    with pytest.raises(UsageError, match="tool.teeth: unknown key"):
        build({"kind": "saw", "teeth": 3}, TOOLS, where="tool", teeth=5)


def test_what_the_surroundings_give_reaches_only_those_who_take_it():
    assert build({"kind": "hammer"}, TOOLS, where="tool", teeth=5).weight == 1


def test_an_argument_that_no_file_can_hold_passes_unchecked():
    handle = nn.Identity()
    assert Hammer(2, handle).handle is handle


def test_arguments_of_a_function_are_held_against_its_signature():
    def cut(depth: int, width: float = 1.0) -> None: ...

    assert fitting(cut, {"depth": 2}, where="cut") == {"depth": 2}
    with pytest.raises(UsageError, match="cut.deep: unknown key; did you mean 'depth'"):
        fitting(cut, {"deep": 2}, where="cut")
    with pytest.raises(UsageError, match="cut: the key 'depth' is missing"):
        fitting(cut, {"width": 2.0}, where="cut")


def test_a_constructor_says_the_same_sentence_in_python():
    for call in (lambda: Saw(0), lambda: Saw(teeth=0)):
        with pytest.raises(UsageError, match=r"^Saw.teeth: input should be greater than or equal to 1, got 0$"):
            call()
    assert Saw(3, spares=[4, 5]).spares == (4, 5)
    assert Saw(3).spares == ()


def test_what_is_kept_under_another_name_cannot_be_written_down():
    class Hidden(Tool):
        def __init__(self, secret: int = 1) -> None:
            self._secret = secret

    with pytest.raises(UsageError, match="Hidden keeps no attribute 'secret', so it cannot be saved"):
        describe(Hidden(), TOOLS)


LOCAL = """
from provq.curriculum.schedules import Schedule

class Squared(Schedule):
    def __init__(self, power: int = 2) -> None:
        self.power = power
    def __call__(self, progress):
        return progress**self.power

class Straight(Schedule):
    def __call__(self, progress):
        return progress

class Other:
    def __init__(self) -> None:
        pass

number = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module outside of provq that can be imported, and has not been."""
    name = "schedules_of_my_own"
    (tmp_path / f"{name}.py").write_text(LOCAL)
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def local(kind, **arguments):
    return build({"kind": kind, **arguments}, kinds.KINDS, where="training.curriculum", local=True)


def test_a_local_mapping_may_name_a_class_of_ones_own(module):
    schedule = local(f"{module}:Squared", power=3)
    assert schedule(0.5) == 0.125
    spec = describe(schedule, kinds.KINDS)
    assert spec == {"kind": f"{module}:Squared", "power": 3}
    assert local(**spec)(0.5) == 0.125
    with pytest.raises(UsageError, match="training.curriculum.power: input should be a valid integer, got 'x'"):
        local(f"{module}:Squared", power="x")


def test_a_class_of_ones_own_needs_no_constructor(module):
    assert local(f"{module}:Straight")(0.25) == 0.25
    with pytest.raises(UsageError, match="training.curriculum.power: unknown key"):
        local(f"{module}:Straight", power=2)


def test_only_a_local_mapping_may_and_nothing_is_imported_otherwise(module):
    with pytest.raises(UsageError, match="unknown kind 'schedules_of_my_own:Squared'"):
        build({"kind": f"{module}:Squared"}, kinds.KINDS, where="x")
    assert module not in sys.modules


@pytest.mark.parametrize("name", ["Other", "number"])
def test_a_class_of_another_base_is_refused(module, name):
    with pytest.raises(UsageError, match=f"training.curriculum.kind: '{module}:{name}' is not a Schedule"):
        local(f"{module}:{name}")


@pytest.mark.parametrize("kind", ["no_such_module:Squared", "schedules_of_my_own:Cubed", "schedules_of_my_own:"])
def test_a_class_that_cannot_be_imported_is_named(module, kind):
    with pytest.raises(UsageError, match=f"training.curriculum.kind: cannot import '{kind}': "):
        local(kind)


@pytest.mark.parametrize("kind", [":Squared", ".relative:Squared", "a..b:Squared"])
def test_a_name_that_no_module_can_have_is_refused(kind):
    with pytest.raises(UsageError, match=f"training.curriculum.kind: cannot import '{kind}'"):
        local(kind)


def test_an_abstract_class_is_refused():
    with pytest.raises(UsageError, match="provq.curriculum.schedules:Schedule"):
        local("provq.curriculum.schedules:Schedule")


@pytest.mark.parametrize(
    ("word", "known", "end"),
    [
        ("consine", ["cosine", "linear"], "did you mean 'cosine'?"),
        ("xyz", ["b", "a"], "known: a, b"),
        ("xyz", [], "none is known"),
    ],
)
def test_the_nearest_word_ends_a_sentence(word, known, end):
    assert nearest(word, known) == end


def test_building_draws_from_the_global_stream_alone():
    spec = describe(THINGS["encoder"][0], ENCODERS)
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(build(spec, ENCODERS, where="x").state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
