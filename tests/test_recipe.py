"""A recipe is found, laid together and built; what is wrong with it is said in one sentence."""

import copy

import pytest
import torch
import yaml

from provq import modalities, recipe
from provq.curriculum import Cosine, Linear
from provq.errors import UsageError, UserError
from provq.evaluation.cost import cost, parameters
from provq.generation.tokens import Shape
from provq.quantizers import Continuous, FiniteScalarQuantizer, VectorQuantizer
from provq.spec import build
from provq.training.adversary import Adversary

TABLES = {
    "data": {"kind": "image", "train": "embedded:photographs", "size": 16},
    "encoder": {"kind": "convolutional", "width": 8, "downsampling": 4},
    "quantizer": {"kind": "vector", "dim": 4, "codebook_size": 16},
    "decoder": {"kind": "convolutional", "width": 8, "downsampling": 4},
    "objective": {"l2": 1.0},
    "training": {"steps": 10, "batch_size": 2, "betas": [0.8, 0.9], "curriculum": {"kind": "linear", "end": 0.5}},
}


@pytest.fixture
def write(tmp_path):
    """Writes a recipe, text or tables, under a name and gives its path."""

    def writing(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return writing


def test_a_recipe_comes_by_name_from_a_file_or_as_a_mapping(write):
    path = write("mine.yaml", TABLES)
    for source in (path, str(path), TABLES):
        assert recipe.load(source).tables == TABLES
    assert recipe.load(path).name == str(path)
    shipped = recipe.load("demo")
    assert shipped.name == "demo"
    assert shipped.tables == yaml.safe_load(recipe.text_of("demo"))
    assert recipe.load("image/tiny64").tables["quantizer"]["codebook_size"] == 1024


def test_tables_come_in_the_order_in_which_data_flows(write):
    assert tuple(recipe.load(dict(reversed(TABLES.items()))).tables) == recipe.TABLES


def test_a_mapping_that_is_loaded_stays_as_it_was():
    before = copy.deepcopy(TABLES)
    loaded = recipe.load(TABLES, ["training.steps=3", "quantizer.dim=9"])
    loaded.tables["data"]["size"] = 1
    loaded.with_changes({"training": {"steps": 7}})
    assert before == TABLES
    assert loaded.tables["training"]["steps"] == 3


def test_a_recipe_extends_another_by_name_or_by_a_file_beside_it(write, tmp_path, monkeypatch):
    write("base.yaml", TABLES)
    write("deep/middle.yaml", "extends: ../base.yaml\ntraining: {steps: 20, seed: 3}\n")
    top = write("deep/top.yaml", "extends: middle.yaml\ntraining: {steps: 30}\n")
    loaded = recipe.load(top)
    assert loaded.tables["training"] == {**TABLES["training"], "steps": 30, "seed": 3}
    assert loaded.tables["data"] == TABLES["data"]
    assert "extends" not in loaded.tables
    monkeypatch.chdir(tmp_path / "deep")
    assert recipe.load("top.yaml").tables == loaded.tables
    of_demo = recipe.load({"extends": "demo", "training": {"steps": 5}})
    assert of_demo.tables["training"] == {**recipe.load("demo").tables["training"], "steps": 5}


def test_an_extended_recipe_that_is_not_there_is_named(write):
    with pytest.raises(UsageError, match="no recipe 'dmeo': .* did you mean 'demo'"):
        recipe.load(write("mine.yaml", "extends: dmeo\n"))


@pytest.mark.parametrize("names", [["a"], ["a", "b"]], ids=["itself", "in a ring"])
def test_a_recipe_that_extends_itself_is_refused(write, names):
    for name, parent in zip(names, names[1:] + names[:1], strict=True):
        path = write(f"{name}.yaml", f"extends: {parent}.yaml\n")
    with pytest.raises(UsageError, match="extends"):
        recipe.load(path)


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("training.steps=200", ("training", "steps"), 200),
        ("training.learning_rate=0.5", ("training", "learning_rate"), 0.5),
        ("training.betas=[0.5, 0.7]", ("training", "betas"), [0.5, 0.7]),
        ("training.curriculum.end=0.9", ("training", "curriculum"), {"kind": "linear", "end": 0.9}),
        ("training.curriculum={kind: cosine}", ("training", "curriculum"), {"kind": "cosine"}),
        ("training.curriculum.kind=cosine", ("training", "curriculum"), {"kind": "cosine"}),
        ("training.hand_overs=0", ("training", "hand_overs"), 0),
        ("data.train=a=b", ("data", "train"), "a=b"),
        ("data.val=", ("data", "val"), None),
        ("data.train='{a,b}/*.tar'", ("data", "train"), "{a,b}/*.tar"),
    ],
)
def test_an_override_changes_one_place(override, place, value):
    loaded = recipe.load(TABLES, [override]).tables
    table, key = place
    assert loaded[table][key] == value
    assert type(loaded[table][key]) is type(value)
    expected = copy.deepcopy(TABLES)
    expected[table][key] = value
    assert loaded == expected


def test_the_last_of_several_overrides_counts():
    assert recipe.load(TABLES, ["training.steps=1", "training.steps=2"]).tables["training"]["steps"] == 2


@pytest.mark.parametrize("override", ["training.steps", "=3", "training..steps=3", ".steps=3", "training.=3", ""])
def test_an_override_without_key_and_value_is_refused(override):
    with pytest.raises(UsageError, match="overrides are key=value, such as training.steps=200"):
        recipe.load(TABLES, [override])


def test_an_override_whose_value_is_no_yaml_is_refused():
    with pytest.raises(UsageError, match=r"training.betas: the value '\[0.5' is not valid YAML"):
        recipe.load(TABLES, ["training.betas=[0.5"])


def test_another_kind_replaces_the_table_whole_and_the_same_kind_only_what_it_names():
    changed = recipe.load(TABLES, ["quantizer={kind: finite_scalar, levels: [8, 5]}"])
    assert changed.tables["quantizer"] == {"kind": "finite_scalar", "levels": [8, 5]}
    same = recipe.load(TABLES, ["quantizer={kind: vector, dim: 9}"])
    assert same.tables["quantizer"] == {**TABLES["quantizer"], "dim": 9}
    laid = recipe.load(TABLES).with_changes({"quantizer": {"kind": "continuous", "dim": 4}})
    assert laid.tables["quantizer"] == {"kind": "continuous", "dim": 4}
    assert laid.tables["training"] == TABLES["training"]


def test_another_kind_takes_along_what_it_says_to_keep():
    kept = recipe.load(TABLES).with_changes({"quantizer": {"kind": "simvq", "keep": ["dim", "heads"], "map": "mlp"}})
    assert kept.tables["quantizer"] == {"kind": "simvq", "dim": 4, "map": "mlp"}
    same = recipe.load(TABLES, ["quantizer={kind: vector, keep: [dim], codebook_size: 32}"])
    assert same.tables["quantizer"] == {"kind": "vector", "dim": 4, "codebook_size": 32}
    with pytest.raises(UsageError, match="keep: expected a list of keys that go along to another kind, got 'dim'"):
        recipe.load(TABLES, ["quantizer={kind: simvq, keep: dim}"])


@pytest.mark.parametrize(
    ("tables", "sentence"),
    [
        ({**TABLES, "trianing": {}}, "unknown table 'trianing'; did you mean 'training'?"),
        ({**TABLES, "zzz": {}}, "unknown table 'zzz'; known: data, decoder, encoder, objective, quantizer, training"),
        ({**TABLES, "kind": "vector"}, "unknown table 'kind'"),
        ({**TABLES, 3: {}}, "unknown table 3"),
        ({**TABLES, True: {}}, "unknown table True"),
        ({key: value for key, value in TABLES.items() if key != "data"}, "the table 'data' is missing"),
        ({**TABLES, "encoder": None}, "the table 'encoder' must be a mapping, got None"),
        ({**TABLES, "training": 5}, "the table 'training' must be a mapping, got 5"),
        ({}, "the table 'data' is missing; a recipe has data, encoder, quantizer, decoder, objective, training"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tables_that_are_unknown_or_missing_are_named(tables, sentence):
    with pytest.raises(UsageError) as caught:
        recipe.load(tables)
    assert f"recipe: {sentence}" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "data: !!python/object/apply:os.getcwd []",
        "!!python/object/new:provq.curriculum.Linear {}",
        "data: !!python/name:os.system",
        "data: [unclosed",
        "a: b: c",
        "data: {[1]: 2}",
        "\ttabs: 1",
    ],
)
def test_a_file_that_is_no_plain_yaml_is_refused(write, content):
    path = write("mine.yaml", content)
    with pytest.raises(UsageError, match="not valid YAML") as caught:
        recipe.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_override_cannot_construct_anything(tmp_path):
    made = tmp_path / "made"
    with pytest.raises(UsageError, match="not valid YAML"):
        recipe.load(TABLES, [f"data.train=!!python/object/apply:os.mkdir ['{made}']"])
    assert not made.exists()


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xff\xfe\x00data")
    with pytest.raises(UserError, match="not valid YAML"):
        recipe.load(path)


@pytest.mark.parametrize("content", ["", "- a\n- b\n", "just text"])
def test_a_file_without_tables_is_refused(write, content):
    with pytest.raises(UsageError, match="expected a mapping, got (NoneType|list|str)"):
        recipe.load(write("mine.yaml", content))


@pytest.mark.parametrize("name", ["../recipes/demo", "image/../demo", "/demo", "..", ".", "", "arms", "no/such"])
def test_a_name_that_leaves_the_folder_of_recipes_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for look in (recipe.load, recipe.text_of, recipe.header_of):
        with pytest.raises(UsageError, match=f"no recipe '{name}': neither a file nor shipped"):
            look(name)


@pytest.mark.parametrize("name", ["../demo", "../arms/linear", "demo", "linaer"])
def test_only_arms_are_found_as_arms(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"no arm '{name}': neither a file nor shipped"):
        recipe.load_changes(name)


def test_an_arm_may_be_a_file(write):
    assert recipe.load_changes(write("arm.yaml", "training: {steps: 3}\n")) == {"training": {"steps": 3}}


@pytest.mark.parametrize("changes", [{"trianing": {"steps": 3}}, {"training": 5}, {"extends": "demo"}], ids=str)
def test_changes_that_would_be_passed_over_are_refused(changes):
    with pytest.raises(UsageError, match=next(iter(changes))):
        recipe.build_parts(recipe.load(TABLES).with_changes(changes))


def test_shipped_recipes_and_arms_are_listed_apart():
    names, arms = recipe.shipped(), recipe.shipped("arms")
    assert {"demo", "image/tiny64"} <= set(names)
    assert {"hard", "linear", "cosine", "deferred", "continuous"} <= set(arms)
    assert not any(name.startswith("arms") for name in names)
    assert names == sorted(names)
    for name in names:
        assert recipe.header_of(name)
    for arm in arms:
        assert recipe.header_of_arm(arm)


OF_PRIORS = [name for name in recipe.shipped() if name.startswith("prior/")]


@pytest.mark.parametrize("name", [name for name in recipe.shipped() if name not in OF_PRIORS])
def test_every_shipped_recipe_builds_its_parts_and_so_does_each_arm_laid_over_it(name):
    base = recipe.load(name)
    if base.tables["encoder"]["kind"] == "vqgan":  # which takes seconds to fill with weights at its own width
        base = base.with_changes({"encoder": {"width": 8}, "decoder": {"width": 8}})
    # Arms change a codebook of its own; a recipe of several stages has no place for what they say.
    arms = recipe.shipped("arms") if base.tables["quantizer"]["kind"] == "vector" else []
    for arm in [None, *arms]:
        laid = base if arm is None else base.with_changes(recipe.load_changes(arm))
        parts = recipe.build_parts(laid)
        assert parts.tokenizer.config["quantizer"]["kind"] == laid.tables["quantizer"]["kind"]
        assert parts.training.steps == laid.tables["training"]["steps"]
        assert parts.schedule(1.0) == (0.0 if arm == "continuous" else 1.0)
        size = laid.tables["data"].get("size", 0)
        assert size % parts.tokenizer.encoder.reduction == 0, "the pictures do not divide into latents"


@pytest.mark.parametrize("name", OF_PRIORS)
def test_every_shipped_recipe_of_a_prior_builds_it_for_the_tokens_of_its_tokenizer(name):
    loaded = recipe.load(name)
    tokenizer = recipe.load(loaded.tables["tokens"]["tokenizer"])
    side = tokenizer.tables["data"]["size"] // tokenizer.tables["encoder"].get("downsampling", 16)
    codes = tokenizer.tables["quantizer"]["codebook_size"]
    small = loaded.with_changes({"prior": {"size": "tiny"}})
    prior = recipe.build_prior(small, Shape((codes,), (side, side), False))
    parts = recipe.build_prior_parts(loaded)
    assert (prior.codebook_sizes, prior.positions) == ((codes,), (side, side))
    assert prior.classes == len(parts.tokens.class_names)
    assert parts.training.steps == loaded.tables["training"]["steps"]


def test_the_prior_for_imagenet_is_of_the_published_size():
    with torch.device("meta"):
        prior = recipe.build_prior(recipe.load("prior/imagenet1k-b"), Shape((16384,), (16, 16), False))
    assert sum(parameter.numel() for parameter in prior.parameters()) / 1e6 == pytest.approx(111, rel=0.01)


PRIOR_TABLES = {
    "tokens": {"tokenizer": "image/digits", "data": "embedded:digits/train", "classes": 10},
    "prior": {"kind": "autoregressive", "size": [1, 16, 2]},
    "sampling": {"guidance": 2.0},
    "training": {"steps": 3},
}


def test_a_recipe_of_a_prior_has_tables_of_its_own_in_the_order_in_which_data_flows():
    loaded = recipe.load(dict(reversed(PRIOR_TABLES.items())))
    assert loaded.is_of_prior and tuple(loaded.tables) == recipe.PRIOR_TABLES
    assert not recipe.load(TABLES).is_of_prior
    without = {name: table for name, table in PRIOR_TABLES.items() if name != "sampling"}
    assert recipe.build_prior_parts(recipe.load(without)).sampling.guidance == 1.0
    assert recipe.build_prior_parts(recipe.load(PRIOR_TABLES)).sampling.guidance == 2.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.hand_overs=3", "training.hand_overs: it is for tokenizers"),
        ("training.curriculum.kind=cosine", "training.curriculum: it is for tokenizers"),
        ("training.stepps=3", r"training.stepps: unknown key; did you mean 'steps'\?"),
        ("tokens.data=", "tokens: give a store, or data"),
        ("tokens.held_out=1.5", "tokens.held_out.*1.5"),
        ("tokens.classes=[a, a]", "tokens.classes: two classes have one name"),
        ("tokens.clases=3", r"tokens.clases: unknown key; did you mean 'classes'\?"),
        ("sampling.top_p=0", "sampling.top_p"),
        ("prior.kind=maskd", r"prior.kind: unknown kind 'maskd'; did you mean 'masked'\?"),
        ("prior.size=tinny", "prior.size.*tiny"),
        ("prior.classes=3", "prior.classes: unknown key"),
        ("pior.size=tiny", r"unknown table 'pior'; did you mean 'prior'\?"),
    ],
)
def test_a_wrong_recipe_of_a_prior_names_the_place(override, message):
    with pytest.raises(UsageError, match=message):
        recipe.build_prior(recipe.load(PRIOR_TABLES, [override]), Shape((64,), (4, 4), False))


def test_a_recipe_of_a_prior_is_none_of_a_tokenizer_and_the_other_way_round():
    with pytest.raises(UsageError, match="is the recipe of a prior, and one of a tokenizer is wanted"):
        recipe.build_parts(recipe.load(PRIOR_TABLES))
    with pytest.raises(UsageError, match="is the recipe of a tokenizer, and one of a prior is wanted"):
        recipe.build_prior_parts(recipe.load(TABLES))
    with pytest.raises(UsageError, match="the table 'training' is missing; a recipe has tokens, prior, sampling"):
        recipe.load({"tokens": {}, "prior": {}})


def test_the_recipe_for_imagenet_is_of_the_published_size():
    parts = recipe.build_parts(recipe.load("image/imagenet1k-vq16"))
    weights, of_item = parameters(parts.tokenizer), cost(parts.tokenizer, parts.modality.blank_item())
    assert weights["encoder"] + weights["decoder"] + 16384 * 8 == 71_883_403  # 71.9 M, as LlamaGen's
    assert (of_item.tokens, of_item.bits) == (256, 256 * 14)
    header = recipe.text_of("image/imagenet1k-vq16").partition("extends:")[0]
    assert f"{sum(of_item.flops.values()) / 1e9:.0f} GFLOPs" in header
    assert parts.adversary is not None and parts.adversary.start == 0.6 and parts.schedule(0.6) == 1


@pytest.mark.parametrize("name", [name for name in recipe.shipped() if name.startswith("image/")])
def test_a_recipe_opens_with_the_command_that_runs_it(name):
    lines = recipe.text_of(name).splitlines()
    assert lines[0].startswith("# ") and lines[1].startswith(f"#   provq train {name} ")


def test_parts_are_what_the_tables_say():
    modality, tokenizer, objective, adversary, training, schedule = recipe.build_parts(recipe.load(TABLES))
    assert adversary is None
    assert isinstance(tokenizer.quantizer, VectorQuantizer)
    assert (tokenizer.encoder.dim, tokenizer.quantizer.dim, tokenizer.decoder.dim) == (4, 4, 4)
    assert tokenizer.codebook_sizes == (16,)
    assert (training.steps, training.batch_size, training.betas) == (10, 2, (0.8, 0.9))
    assert isinstance(schedule, Linear)
    assert (schedule.start, schedule.end) == (0.1, 0.5)
    assert (objective.l2, objective.l1, objective.quantizer) == (1.0, 0.0, 1.0)
    assert modality.size == 16
    again = build(tokenizer.metadata["data"], modalities.KINDS, where="data")
    assert vars(again) == vars(modality)
    items = torch.zeros(2, 3, 16, 16)
    assert tokenizer(items).output.shape == items.shape


def test_an_adversary_judges_what_the_data_gives():
    adversary = {"discriminator": {"kind": "style", "width": 4}, "loss": "non_saturating", "start": 0.7}
    parts = recipe.build_parts(recipe.load({**TABLES, "objective": {"l1": 1.0, "adversary": adversary}}))
    assert isinstance(parts.adversary, Adversary)
    assert (parts.adversary.discriminator.size, parts.adversary.discriminator.channels) == (16, 3)
    assert (parts.adversary.loss, parts.adversary.start) == ("non_saturating", 0.7)
    alone = recipe.build_parts(recipe.load(TABLES)).tokenizer.state_dict()
    assert all(torch.equal(tensor, alone[name]) for name, tensor in parts.tokenizer.state_dict().items())


@pytest.mark.parametrize(
    ("adversary", "training", "message"),
    [
        ("patch", {}, "objective.adversary: expected a mapping, got 'patch'"),
        ({"wieght": 1.0}, {}, "objective.adversary.wieght: unknown key; did you mean 'weight'"),
        ({"discriminator": {"kind": "pach"}}, {}, "objective.adversary.discriminator.kind: .*did you mean 'patch'"),
        ({}, {"curriculum": {"kind": "cosine", "end": 0.99}}, "hardness is 1, .* end the anneal earlier"),
        ({"adaptive": True}, {"precision": "bf16-mixed"}, "objective.adversary.adaptive: needs training.precision"),
        ({"adaptive": True}, {"strategy": "fsdp"}, "objective.adversary.adaptive: needs training.strategy: ddp"),
        ({}, {"precision": "16-mixed"}, "objective.adversary: needs training.precision: bf16-mixed or 32-true"),
    ],
)
def test_a_wrong_adversary_is_told(adversary, training, message):
    tables = {**TABLES, "objective": {"l1": 1.0, "adversary": adversary}}
    with pytest.raises(UsageError, match=message):
        recipe.build_parts(recipe.load(tables).with_changes({"training": training}))


def test_without_a_curriculum_hardness_is_annealed_along_a_cosine():
    tables = copy.deepcopy(TABLES)
    del tables["training"]["curriculum"]
    assert isinstance(recipe.build_parts(recipe.load(tables)).schedule, Cosine)
    assert "curriculum" not in tables["training"]


def test_the_seed_of_a_recipe_fixes_its_weights():
    prints = [
        recipe.build_parts(recipe.load(TABLES, [f"training.seed={seed}"])).tokenizer.fingerprint for seed in (1, 2, 1)
    ]
    assert prints[0] == prints[2] != prints[1]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.sizes=3", "data.sizes: unknown key; did you mean 'size'?"),
        ("encoder.width=-8", "encoder.width: input should be greater than or equal to 1, got -8"),
        ("encoder.width=6", "width must be a multiple of downsampling=4, got 6; nearest: 8"),
        ("quantizer.kind=vectr", "quantizer.kind: unknown kind 'vectr'; did you mean 'vector'?"),
        ("quantizer.codebook_size=many", "quantizer.codebook_size: input should be a valid integer, got 'many'"),
        ("decoder.dept=2", "decoder.dept: unknown key; did you mean 'depth'?"),
        ("decoder.stages=3", "decoder.stages is 3, and the quantizer's number of codebooks is 1; let them be equal"),
        ("objective.l22=1", "objective.l22: unknown key; did you mean 'l2'?"),
        ("objective.l2=-1", "objective.l2: input should be greater than or equal to 0, got -1"),
        ("training.step=3", "training.step: unknown key; did you mean 'steps'?"),
        ("training.betas=[0.9, 2]", "training.betas.1: input should be less than"),
        ("training.steps.x=3", "training.steps: input should be a valid integer, got {'x': 3}"),
        ("training.curriculum.kind=cosin", "training.curriculum.kind: unknown kind 'cosin'; did you mean 'cosine'?"),
        ("training.curriculum=", "training.curriculum: expected a mapping with the key 'kind', got None"),
        ("training.precision=float32", "training.precision: input should be '32-true'"),
    ],
)
def test_what_cannot_be_built_is_named_with_its_place(override, sentence):
    loaded = recipe.load(TABLES, [override])
    with pytest.raises(UsageError) as caught:
        recipe.build_parts(loaded)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("name", [*recipe.shipped(), None])
def test_the_resolved_recipe_is_a_file_that_loads_to_the_same_tables(name, write):
    loaded = recipe.load(TABLES if name is None else name, ["training.steps=7", "training.betas=[0.1, 0.2]"])
    again = recipe.load(write("resolved.yaml", loaded.to_yaml()))
    assert again.tables == loaded.tables
    assert list(again.tables) == list(loaded.tables)


def test_tables_from_python_may_hold_tuples(write):
    tables = copy.deepcopy(TABLES)
    tables["training"]["betas"] = (0.8, 0.9)
    tables["training"]["curriculum"] = {"kind": "piecewise", "points": ((0.1, 0.0), (0.6, 1.0))}
    loaded = recipe.load(tables)
    parts = recipe.build_parts(loaded)
    again = recipe.build_parts(recipe.load(write("resolved.yaml", loaded.to_yaml())))
    assert again.training.betas == parts.training.betas == (0.8, 0.9)
    assert again.schedule.points == parts.schedule.points


@pytest.mark.parametrize(
    ("table", "made"),
    [
        ({"kind": "finite_scalar", "levels": [8, 5, 5]}, FiniteScalarQuantizer),
        ({"kind": "continuous", "dim": 6}, Continuous),
    ],
)
def test_the_length_of_a_latent_is_that_of_the_quantizer(table, made):
    tokenizer = recipe.build_parts(recipe.load({**TABLES, "quantizer": table})).tokenizer
    assert isinstance(tokenizer.quantizer, made)
    assert tokenizer.encoder.dim == tokenizer.decoder.dim == tokenizer.quantizer.dim
