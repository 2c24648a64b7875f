"""The autoregressive prior: a true distribution over items, drawn from as it is measured."""

import itertools
import math

import pytest
import torch
from languages import autoregressive, every_item, generators
from scipy.stats import chisquare
from torch import nn

from provq.errors import UsageError, UserError
from provq.generation import AutoregressivePrior, Sampling, generator_of, sample_without_memory

SHAPES = {
    "a grid": {"codebook_sizes": (3,), "positions": (2, 2)},
    "several codebooks": {"codebook_sizes": (2, 3, 2), "positions": (2,)},
    "a grid of several codebooks": {"codebook_sizes": (2, 2), "positions": (2, 1)},
    "ragged": {"codebook_sizes": (3,), "positions": (4,), "ragged": True},
    "ragged, several codebooks": {"codebook_sizes": (2, 3), "positions": (3,), "ragged": True},
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.mark.parametrize(("size", "millions"), [("B", 111), ("L", 343), ("XL", 775), ("XXL", 1411), ("3B", 3097)])
def test_sizes_have_the_parameters_that_were_published(size, millions):
    # 111M, 343M, 775M, 1.4B and 3.1B for 16384 codes and 1000 classes (arXiv 2406.06525, table 1).
    with torch.device("meta"):
        prior = AutoregressivePrior((16384,), (16, 16), 1000, size=size)
    assert round(sum(parameter.numel() for parameter in prior.parameters()) / 1e6) == millions


@shapes
def test_the_probabilities_of_all_items_sum_to_one(shape):
    prior = autoregressive(**shape)
    items = every_item(prior)
    for label in (-1, 0, 2):
        nats = prior.nats(items, torch.full((len(items),), label))
        assert nats.std() > 0.1
        assert math.isclose(float((-nats).exp().sum()), 1, rel_tol=1e-12)


@shapes
def test_an_untrained_prior_finds_all_codes_equally_likely(shape):
    prior = AutoregressivePrior(**shape, size=(1, 8, 2))
    items = every_item(prior)
    labels = torch.full((len(items),), -1)
    choices = prior.codebook_sizes
    first = sum(math.log(size) for size in choices)
    if not prior.ragged:
        expected = torch.full((len(items),), math.prod(prior.positions) * first)
    else:
        lengths = (items.reshape(len(items), prior.positions[0], -1)[..., 0] >= 0).sum(1)
        with_end = first - math.log(choices[0]) + math.log(choices[0] + 1)
        expected = first + (lengths - 1) * with_end + (lengths < prior.positions[0]) * math.log(choices[0] + 1)
    torch.testing.assert_close(prior.nats(items, labels), expected.float())


@shapes
def test_the_frequency_of_drawn_items_is_their_probability(shape):
    prior = autoregressive(**shape)
    items = every_item(prior)
    number = 6000
    drawn = prior.sample(torch.full((number,), 1), Sampling(), generators(number))
    likely = (-prior.nats(items, torch.full((len(items),), 1))).exp()
    places = {tuple(item.flatten().tolist()): place for place, item in enumerate(items)}
    counts = torch.zeros(len(items))
    for item in drawn:
        counts[places[tuple(item.flatten().tolist())]] += 1
    # Rare items are taken together with one that is not, so that the test's approximation holds.
    order = likely.argsort()
    first = int((likely * number < 8).sum())
    observed = torch.cat((counts[order[: first + 1]].sum()[None], counts[order[first + 1 :]]))
    expected = torch.cat((likely[order[: first + 1]].sum()[None], likely[order[first + 1 :]])) * number
    assert len(expected) >= 5
    assert chisquare(observed.numpy(), expected.numpy(), sum_check=False).pvalue > 1e-3


@shapes
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0),
        Sampling(temperature=0.7, top_k=2, guidance=2.5),
        Sampling(top_p=0.8, guidance=1.5, guidance_schedule="cosine"),
    ],
    ids=str,
)
def test_the_memory_changes_no_token(shape, sampling):
    prior = autoregressive(**shape)
    labels = torch.tensor([0, 1, 2, -1, 0, 1])
    with_memory = prior.sample(labels, sampling, generators(6))
    without = sample_without_memory(prior, labels, sampling, generators(6))
    assert torch.equal(with_memory, without)
    assert len({tuple(item.flatten().tolist()) for item in with_memory}) > 1


def test_the_memory_changes_no_token_of_a_long_item():
    prior = autoregressive((50,), (8, 8), size=(3, 24, 3)).float()
    labels = torch.arange(4) % 3
    with_memory = prior.sample(labels, Sampling(), generators(4))
    assert torch.equal(with_memory, sample_without_memory(prior, labels, Sampling(), generators(4)))
    assert len(with_memory.unique()) > 25


@pytest.mark.parametrize("shape", [SHAPES["a grid"], SHAPES["several codebooks"]], ids=["grid", "codebooks"])
def test_nothing_depends_on_a_later_token(shape):
    prior = autoregressive(**shape)
    items, labels = every_item(prior)[:1], torch.tensor([0])
    flat = items.reshape(1, -1, len(prior.codebook_sizes))
    before = prior._nats(flat, labels)
    for place in range(flat.shape[1]):
        other = flat.clone()
        other[:, place] = (other[:, place] + 1) % torch.tensor(prior.codebook_sizes)
        changed = (prior._nats(other, labels) != before)[0]
        assert not changed[:place].any()
        assert changed[place:].all()


def by_hand(prior, item, label):
    """Nats of one item by plain formulas: complex numbers turn, and loops attend."""
    weights = {name: value.detach() for name, value in prior.state_dict().items()}
    books, heads = len(prior.codebook_sizes), prior.size[2]
    item = item.reshape(-1, books)
    places = list(itertools.product(*(range(side) for side in prior.positions)))

    def norm(row, name):
        return row / (row.square().mean() + 1e-5).sqrt() * weights[f"{name}.weight"]

    def feed_forward(row, name):
        gate, wide = (weights[f"{name}.gate_widen.weight"] @ row).chunk(2)
        return weights[f"{name}.narrow.weight"] @ (gate / (1 + (-gate).exp()) * wide)

    def turned(row, place):
        first, second = row.chunk(2)
        pairs = len(first) // len(places[0])
        angles = [
            (0 if place == 0 else places[place - 1][axis]) / 10000 ** (pair / pairs)
            for axis in range(len(places[0]))
            for pair in range(pairs)
        ]
        new = torch.complex(first, second) * torch.exp(1j * torch.tensor(angles, dtype=torch.float64))
        return torch.cat((new.real, new.imag))

    def code(book, place):
        return weights[f"codes.embeddings.{book}.weight"][item[place, book]]

    rows = [weights["class_embedding.weight"][label]]
    rows += [sum(code(book, place) for book in range(books)) for place in range(len(places) - 1)]
    for block in (f"blocks.{number}" for number in range(prior.size[0])):
        parts = [
            (weights[f"{block}.queries_keys_values.weight"] @ norm(row, f"{block}.attention_norm")).reshape(
                3, heads, -1
            )
            for row in rows
        ]
        attended = []
        for place, (queries, _, _) in enumerate(parts):
            of_heads = []
            for head in range(heads):
                query = turned(queries[head], place)
                scores = [query @ turned(parts[past][1][head], past) for past in range(place + 1)]
                shares = (torch.stack(scores) / math.sqrt(len(query))).softmax(0)
                of_heads.append(sum(share * parts[past][2][head] for past, share in enumerate(shares)))
            attended.append(weights[f"{block}.gather.weight"] @ torch.cat(of_heads))
        rows = [row + more for row, more in zip(rows, attended, strict=True)]
        rows = [row + feed_forward(norm(row, f"{block}.feed_forward_norm"), f"{block}.feed_forward") for row in rows]
    total = 0.0
    for place, row in enumerate(rows):
        hidden = norm(row, "norm")
        for book in range(books):
            seen = hidden
            if book > 0:
                before = sum(code(earlier, place) for earlier in range(book))
                seen = hidden + norm(before, f"codes.norms.{book - 1}")
                seen = seen + feed_forward(seen, f"codes.feed_forwards.{book - 1}")
            logits = weights[f"codes.outputs.{book}.weight"] @ seen
            total += float(logits.exp().sum().log() - logits[item[place, book]])
    return total


@pytest.mark.parametrize(
    ("codebook_sizes", "positions"), [((7,), (3, 2)), ((4, 3, 5), (2, 2)), ((6,), (5,)), ((3,), (2, 2, 2))]
)
def test_nats_are_those_of_plain_formulas(codebook_sizes, positions):
    prior = autoregressive(codebook_sizes, positions, size=(2, 24, 2))
    generator = torch.Generator().manual_seed(1)
    several = (len(codebook_sizes),) if len(codebook_sizes) > 1 else ()
    items = torch.randint(min(codebook_sizes), (3, *positions, *several), generator=generator)
    labels = torch.tensor([2, 0, -1])
    expected = [by_hand(prior, item, label) for item, label in zip(items, labels, strict=True)]
    # The angles of the prior are computed in float32.
    torch.testing.assert_close(
        prior.nats(items, labels), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0
    )


def test_a_row_of_tokens_is_read_as_transformers_reads_it():
    transformers = pytest.importorskip("transformers", reason="the oracle is transformers' Llama")
    prior = autoregressive((11,), (7,), size=(3, 32, 4))
    config = transformers.LlamaConfig(
        vocab_size=11,
        hidden_size=32,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        rms_norm_eps=1e-5,
        attn_implementation="eager",
    )
    llama = transformers.LlamaForCausalLM(config).double().eval()
    ours, theirs = prior.state_dict(), {}
    for block in range(3):
        here, there = f"blocks.{block}", f"model.layers.{block}"
        attention = ours[f"{here}.queries_keys_values.weight"].chunk(3)
        for name, weight in zip("qkv", attention, strict=True):
            theirs[f"{there}.self_attn.{name}_proj.weight"] = weight
        gate, up = ours[f"{here}.feed_forward.gate_widen.weight"].chunk(2)
        theirs[f"{there}.self_attn.o_proj.weight"] = ours[f"{here}.gather.weight"]
        theirs[f"{there}.mlp.gate_proj.weight"], theirs[f"{there}.mlp.up_proj.weight"] = gate, up
        theirs[f"{there}.mlp.down_proj.weight"] = ours[f"{here}.feed_forward.narrow.weight"]
        theirs[f"{there}.input_layernorm.weight"] = ours[f"{here}.attention_norm.weight"]
        theirs[f"{there}.post_attention_layernorm.weight"] = ours[f"{here}.feed_forward_norm.weight"]
    theirs["model.norm.weight"], theirs["lm_head.weight"] = ours["norm.weight"], ours["codes.outputs.0.weight"]
    theirs["model.embed_tokens.weight"] = ours["codes.embeddings.0.weight"]
    llama.load_state_dict(theirs)
    items, labels = torch.randint(11, (5, 7), generator=torch.Generator().manual_seed(0)), torch.arange(5) % 3
    entering = torch.cat(
        (ours["class_embedding.weight"][labels][:, None], theirs["model.embed_tokens.weight"][items]), 1
    )
    with torch.no_grad():
        # The class and the first token share the angle 0.
        logits = llama(inputs_embeds=entering[:, :-1], position_ids=torch.tensor([[0, 0, 1, 2, 3, 4, 5]])).logits
    expected = nn.functional.cross_entropy(logits.mT, items, reduction="none").sum(1)
    torch.testing.assert_close(prior.nats(items, labels), expected, rtol=1e-6, atol=0)


def next_codes(prior, item, label):
    """Log probabilities of the codes at the next place of an item that so far has only some, from nats alone."""
    place = int((item >= 0).sum())
    longer = item.repeat(prior.codebook_sizes[0], 1)
    longer[:, place] = torch.arange(prior.codebook_sizes[0])
    label = torch.tensor([label])
    return prior.nats(item[None], label) - prior.nats(longer, label.expand(len(longer)))


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_guidance_weighs_logits_with_and_without_the_class(schedule):
    prior = autoregressive((9,), (5,), classes=4)
    sampling = Sampling(temperature=0, guidance=3.0, guidance_schedule=schedule)
    drawn = prior.sample(torch.arange(4), sampling, generators(4))
    unguided = 0
    for label, tokens in enumerate(drawn):
        item = torch.full((5,), -1)
        for place in range(5):
            scale = 3.0 if schedule == "constant" else 1 + 2 * place / 4
            conditional, unconditional = next_codes(prior, item, label), next_codes(prior, item, -1)
            item[place] = (unconditional + scale * (conditional - unconditional)).argmax()
            unguided += int(conditional.argmax() != item[place])
        assert torch.equal(tokens, item)
    assert unguided > 0


def test_guidance_of_scale_one_is_conditional_sampling_and_costs_no_more():
    prior = autoregressive()
    rows = []
    prior.blocks[0].register_forward_hook(lambda _block, given, _output: rows.append(len(given[0])))
    labels = torch.tensor([0, 1, 2])
    plain = prior.sample(labels, Sampling(), generators(3))
    assert set(rows) == {3}
    for schedule in ("constant", "linear", "cosine"):
        guided = prior.sample(labels, Sampling(guidance=1, guidance_schedule=schedule), generators(3))
        assert torch.equal(guided, plain)
    assert set(rows) == {3}
    prior.sample(labels, Sampling(guidance=1.1), generators(3))
    assert set(rows) == {3, 6}


def test_an_item_is_the_same_among_any_others():
    prior = autoregressive((6, 4), (3, 2))
    labels = torch.arange(7) % 3
    sampling = Sampling(top_p=0.9, guidance=1.5)
    together = prior.sample(labels, sampling, generators(7))
    order = torch.tensor([5, 2, 6, 0])
    others = prior.sample(labels[order], sampling, [generator_of(0, int(item)) for item in order])
    assert torch.equal(others, together[order])
    alone = prior.sample(labels[3:4], sampling, [generator_of(0, 3)])
    assert torch.equal(alone, together[3:4])


def test_ragged_items_end_once_and_have_a_token():
    prior = autoregressive((4, 3), (6,), ragged=True)
    drawn = prior.sample(torch.full((300,), 0), Sampling(), generators(300))
    present = drawn >= 0
    assert torch.equal(present[..., 0], present[..., 1])
    assert present[:, 0].all()
    assert not (present[:, 1:] & ~present[:, :-1]).any()
    assert len(present[..., 0].sum(1).unique()) == 6
    assert prior.nats(drawn, torch.full((300,), 0)).isfinite().all()


def test_the_nats_of_a_part_are_those_of_all_that_may_follow():
    prior = autoregressive((4,), (2, 2))
    part = torch.tensor([[[1, 3], [2, -1]]])
    whole = part.repeat(4, 1, 1)
    whole[:, 1, 1] = torch.arange(4)
    everything = (-prior.nats(whole, torch.zeros(4, dtype=torch.int64))).logsumexp(0)
    torch.testing.assert_close(-prior.nats(part, torch.tensor([0]))[0], everything)


def test_a_token_that_lacks_inside_of_an_item_carries_no_loss_and_does_not_end_it():
    prior = autoregressive((4,), (5,), ragged=True)
    items = torch.tensor([[1, -1, 3, -1, -1]])
    targets = prior._targets(items, torch.tensor([0]))
    assert targets[0, :, 0].tolist() == [1, -1, 3, 4, -1]
    nats = prior._nats(targets, torch.tensor([0]))
    assert (nats[0] != 0).tolist() == [True, False, True, True, False]
    assert math.isclose(prior.loss(items, torch.tensor([0])).item(), nats.sum().item() / 3)


@shapes
def test_the_loss_in_evaluation_mode_is_the_mean_of_nats(shape):
    prior = autoregressive(**shape)
    items = every_item(prior)[::5]
    labels = torch.arange(len(items)) % 3
    flat = items.reshape(len(items), math.prod(prior.positions), -1)
    ends = (flat[:, -1, 0] < 0).sum() if prior.ragged else 0
    expected = prior.nats(items, labels).sum() / ((items >= 0).sum() + ends)
    torch.testing.assert_close(prior.loss(items, labels), expected)


def test_training_hides_as_many_classes_as_it_was_told():
    prior = autoregressive(classes=3, class_dropout=0.25, token_dropout=0.0, dropout=0.0).train()
    seen = []
    prior.class_embedding.register_forward_hook(lambda _table, given, _output: seen.append(given[0]))
    items, labels = torch.zeros(400, 2, 3, dtype=torch.int64), torch.arange(400) % 3
    torch.manual_seed(0)
    first = prior.loss(items, labels)
    torch.manual_seed(0)
    assert torch.equal(prior.loss(items, labels), first)
    hidden = seen[0] == 3
    assert torch.equal(seen[0][~hidden], labels[~hidden])
    assert 70 < hidden.sum() < 130
    prior.eval().loss(items, labels)
    assert torch.equal(seen[2], labels)


def test_a_deterministic_language_is_learned_and_spoken():
    torch.manual_seed(0)
    prior = AutoregressivePrior((8, 4), (3, 3), 4, size=(2, 32, 2), token_dropout=0.0, dropout=0.0, class_dropout=0.5)
    labels = torch.arange(4)
    places = torch.arange(9).reshape(3, 3)
    codes = (3 * labels[:, None, None] + places**2) % 8
    items = torch.stack((codes, (codes + labels[:, None, None]) % 4), -1)
    optimizer = torch.optim.Adam(prior.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        prior.loss(items, labels).backward()
        optimizer.step()
    assert prior.nats(items, labels).max() / 18 < 0.02
    assert torch.equal(prior.sample(labels, Sampling(), generators(4)), items)
    # Without a class it speaks of all four, and of little else.
    likely = (-prior.nats(items, torch.full((4,), -1))).exp()
    assert likely.sum() > 0.8
    assert likely.min() > 0.05


def test_nats_and_sampling_leave_the_mode_as_it_was():
    prior = autoregressive(dropout=0.5).train()
    items, labels = torch.zeros(2, 2, 3, dtype=torch.int64), torch.tensor([0, 1])
    assert torch.equal(prior.nats(items, labels), prior.nats(items, labels))
    prior.sample(labels, Sampling(), generators(2))
    assert prior.training
    assert prior.blocks[0].training


def test_half_precision_is_close():
    prior = autoregressive((6, 4), (3, 2)).float()
    items, labels = torch.ones(2, 3, 2, 2, dtype=torch.int64), torch.tensor([0, 1])
    with torch.autocast("cpu", torch.bfloat16):
        loss = prior.loss(items, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, prior.loss(items, labels), rtol=0.02, atol=0.02)
    drawn = prior.bfloat16().sample(labels, Sampling(), generators(2))
    assert drawn.shape == items.shape


def test_no_items_are_no_trouble():
    prior = autoregressive((6, 4), (3, 2))
    nobody = torch.zeros(0, dtype=torch.int64)
    drawn = prior.sample(nobody, Sampling(guidance=2.0), [])
    assert drawn.shape == (0, 3, 2, 2)
    assert prior.nats(drawn, nobody).shape == (0,)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"codebook_sizes": ()}, "codebook_sizes"),
        ({"codebook_sizes": (0,)}, "codebook_sizes.0"),
        ({"positions": (2, 0)}, "positions.1"),
        ({"positions": (2, 2), "ragged": True}, "one axis"),
        ({"size": "M"}, "size"),
        ({"size": (1, 10, 4)}, "10 is not a multiple of its 4 heads"),
        ({"size": (1, 12, 2)}, "multiple of 4 channels"),
        ({"class_dropout": 1.0}, "class_dropout"),
        ({"classes": -1}, "classes"),
    ],
)
def test_what_cannot_be_built_is_refused_in_a_sentence(options, sentence):
    arguments = {"codebook_sizes": (4,), "positions": (2, 2), **options}
    with pytest.raises(UsageError, match=sentence):
        AutoregressivePrior(**arguments)


@pytest.mark.parametrize(
    ("items", "labels", "sentence"),
    [
        (torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), r"shape \(2, 3\), got \(6,\)"),
        (torch.full((2, 2, 3), 5), torch.zeros(2, dtype=torch.int64), r"codebooks of \(5,\)"),
        (torch.full((2, 2, 3), -2), torch.zeros(2, dtype=torch.int64), "expected -1 or"),
        (torch.zeros(2, 2, 3, dtype=torch.int64), torch.tensor([0, 3]), r"class below 3, got \[0, 3\]"),
    ],
)
def test_items_of_another_prior_are_refused(items, labels, sentence):
    prior = autoregressive()
    with pytest.raises(UserError, match=sentence):
        prior.loss(items, labels)
    with pytest.raises(UserError, match=sentence):
        prior.nats(items, labels)


def test_each_item_has_a_generator_of_its_own():
    with pytest.raises(UserError, match="one for each of 2 items, got 1"):
        autoregressive().sample(torch.tensor([0]), Sampling(), generators(2))


@pytest.mark.parametrize(("options", "lacks"), [({"classes": 0}, "classes"), ({"class_dropout": 0.0}, "class dropout")])
def test_what_never_learned_to_do_without_a_class_is_not_guided(options, lacks):
    prior = autoregressive(**options)
    labels = torch.tensor([-1])
    assert prior.sample(labels, Sampling(guidance=1), generators(1)).shape == (1, 2, 3)
    with pytest.raises(UsageError, match=f"had no {lacks}.*, got 2"):
        prior.sample(labels, Sampling(guidance=2), generators(1))
