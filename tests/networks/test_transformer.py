"""Attention held against a softmax written out, and rotary positions against the law that offsets alone count."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import gelu, layer_norm, multi_head_attention_forward, scaled_dot_product_attention

from provq.errors import UsageError
from provq.networks.transformer import TransformerBlock, rotary_positions, rotate


def noise(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def awake(width=16, heads=2, seed=0, dtype=torch.float64):
    """A block whose every weight counts, as after some training."""
    block = TransformerBlock(width, heads).to(dtype)
    with torch.no_grad():
        for place, parameter in enumerate(block.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=100 * seed + place, dtype=dtype) / parameter.shape[-1] ** 0.5)
    return block


def written_out(block, tokens, rotary=None, mask=None):
    """The block, token by token and head by head."""
    width, head_dim = tokens.shape[-1], tokens.shape[-1] // block.heads
    normed = layer_norm(tokens, (width,), block.attention_norm.weight, block.attention_norm.bias)
    attended = torch.zeros_like(tokens)
    for item in range(len(tokens)):
        for head in range(block.heads):
            rows = slice(head * head_dim, (head + 1) * head_dim)
            query, key, value = (
                normed[item] @ weight[rows].T for weight in block.queries_keys_values.weight.split(width)
            )
            query = query / (query.square().mean(-1, keepdim=True) + 1e-6).sqrt() * block.query_scale
            key = key / (key.square().mean(-1, keepdim=True) + 1e-6).sqrt() * block.key_scale
            if rotary is not None:
                turn = torch.complex(*rotary.double())
                query, key = (torch.complex(*values.chunk(2, -1)) * turn for values in (query, key))
                scores = (query @ key.conj().T).real / math.sqrt(head_dim)
            else:
                scores = query @ key.T / math.sqrt(head_dim)
            weights = scores.exp() if mask is None else scores.exp() * mask[item]
            attended[item][:, rows] = weights @ value / weights.sum(-1, keepdim=True)
    tokens = tokens + attended @ block.gather.weight.T + block.gather.bias
    normed = layer_norm(tokens, (width,), block.feed_forward_norm.weight, block.feed_forward_norm.bias)
    wide = gelu(normed @ block.widen.weight.T + block.widen.bias)
    return tokens + wide @ block.narrow.weight.T + block.narrow.bias


@settings(max_examples=25, deadline=None)
@given(
    number=st.integers(0, 3),
    rows=st.integers(1, 3),
    columns=st.integers(1, 4),
    heads=st.integers(1, 3),
    pairs=st.integers(1, 2),
    turned=st.booleans(),
    masked=st.booleans(),
)
def test_a_block_is_what_its_formula_says(number, rows, columns, heads, pairs, turned, masked):
    width, tokens = 4 * pairs * heads, rows * columns
    block = awake(width, heads)
    values = noise(number, tokens, width)
    rotary = rotary_positions(rows, columns, 4 * pairs) if turned else None
    mask = noise(number, tokens, seed=1) > 0 if masked else None
    if mask is not None:
        mask[:, 0] = True  # who attends to none is a case of its own
    out = block(values, rotary, mask)
    assert out.shape == values.shape
    assert out.dtype == values.dtype
    torch.testing.assert_close(out, written_out(block, values, rotary, mask), rtol=1e-6, atol=1e-8)


def test_without_the_norm_of_queries_and_keys_attention_is_that_of_torch(monkeypatch):
    monkeypatch.setattr("provq.networks.transformer.rms_norm", lambda values, shape, eps: values)
    block = awake(24, 3)
    with torch.no_grad():
        block.query_scale.fill_(1)
        block.key_scale.fill_(1)
    tokens = noise(2, 7, 24)
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    theirs, _ = multi_head_attention_forward(
        *[tokens.transpose(0, 1)] * 3,
        embed_dim_to_check=24,
        num_heads=3,
        in_proj_weight=block.queries_keys_values.weight,
        in_proj_bias=None,
        bias_k=None,
        bias_v=None,
        add_zero_attn=False,
        dropout_p=0.0,
        out_proj_weight=block.gather.weight,
        out_proj_bias=block.gather.bias,
        key_padding_mask=~mask,
    )
    torch.testing.assert_close(block._attention(tokens, None, mask), theirs.transpose(0, 1))


def test_scores_stay_bounded_however_large_the_weights(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "provq.networks.transformer.scaled_dot_product_attention",
        lambda queries, keys, values, attn_mask: (
            seen.append(queries @ keys.mT / math.sqrt(keys.shape[-1]))
            or scaled_dot_product_attention(queries, keys, values, attn_mask=attn_mask)
        ),
    )
    block = TransformerBlock(32, 2).double()
    with torch.no_grad():
        block.queries_keys_values.weight.mul_(1e4)
    block(noise(1, 50, 32))
    # Two vectors of 16 channels and root mean square 1 have a product of at most 16; the root of 16 divides it.
    assert seen[0].abs().max() <= 4 * (1 + 1e-9)


def test_without_positions_order_means_nothing():
    block, tokens, order = awake(), noise(2, 9, 16), torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(block(tokens[:, order]), block(tokens)[:, order])


def test_with_positions_order_means_something():
    block, tokens, rotary = awake(), noise(2, 9, 16), rotary_positions(3, 3, 8)
    assert not torch.allclose(block(tokens.flip(1), rotary), block(tokens, rotary).flip(1), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_that_is_not_there_has_no_influence(dtype):
    block, tokens, rotary = awake(dtype=dtype), noise(2, 9, 16, dtype=dtype), rotary_positions(1, 9, 8)
    mask = torch.arange(9) < torch.tensor([[9], [5]])
    other = torch.where(mask[..., None], tokens, 1e3 * noise(2, 9, 16, seed=1, dtype=dtype))
    assert torch.equal(block(tokens, rotary, mask)[mask], block(other, rotary, mask)[mask])
    assert not torch.equal(block(tokens, rotary)[mask], block(other, rotary)[mask])


def test_padding_a_batch_changes_nothing():
    block, short, long = awake(), noise(5, 16), noise(8, 16, seed=1)
    batch = torch.nn.utils.rnn.pad_sequence([short, long], batch_first=True)
    out = block(batch, rotary_positions(1, 8, 8), torch.arange(8) < torch.tensor([[5], [8]]))
    torch.testing.assert_close(out[0, :5], block(short[None], rotary_positions(1, 5, 8))[0])
    torch.testing.assert_close(out[1], block(long[None], rotary_positions(1, 8, 8))[0])


def test_an_item_without_tokens_stays_finite():
    block, tokens = awake(), noise(2, 4, 16).requires_grad_()
    out = block(tokens, mask=torch.tensor([[True] * 4, [False] * 4]))
    out.sum().backward()
    assert out.isfinite().all()
    assert tokens.grad.isfinite().all()


def score(query, key, place, other, size=9):
    """The product of two turned vectors at two places of a grid of `size` columns."""
    cosines_and_sines = rotary_positions(size, size, len(query))
    at = [row * size + column for row, column in (place, other)]
    turned = rotate(torch.stack((query, key)), cosines_and_sines[:, at])
    return turned[0] @ turned[1]


@settings(max_examples=50, deadline=None)
@given(
    pairs=st.integers(1, 4),
    places=st.tuples(*[st.integers(0, 5)] * 4),
    down=st.integers(0, 3),
    right=st.integers(0, 3),
)
def test_the_score_of_two_tokens_depends_on_their_offset_alone(pairs, places, down, right):
    query, key = noise(4 * pairs), noise(4 * pairs, seed=1)
    row, column, other_row, other_column = places
    still = score(query, key, (row, column), (other_row, other_column))
    for dy, dx in ((down, 0), (0, right), (down, right)):
        moved = score(query, key, (row + dy, column + dx), (other_row + dy, other_column + dx))
        torch.testing.assert_close(moved, still, rtol=0, atol=1e-5)


@pytest.mark.parametrize("other", [(3, 4), (4, 3), (2, 3), (3, 2)])
def test_a_step_in_either_direction_is_seen(other):
    query, key = noise(16), noise(16, seed=1)
    assert (score(query, key, (3, 3), other) - score(query, key, (3, 3), (3, 3))).abs() > 1e-2


def test_rows_turn_one_half_of_the_pairs_and_columns_the_other():
    cosines, sines = rotary_positions(3, 4, 16).unflatten(1, (3, 4))
    assert cosines.shape == (3, 4, 8)
    for table in (cosines, sines):
        assert torch.equal(table[:, :1, :4].expand(3, 4, 4), table[..., :4])
        assert torch.equal(table[:1, :, 4:].expand(3, 4, 4), table[..., 4:])
    angles = torch.atan2(sines[1, 2], cosines[1, 2])
    expected = [100 ** -(pair / 4) * place for place in (1, 2) for pair in range(4)]
    torch.testing.assert_close(angles, torch.tensor(expected))


def test_turning_keeps_lengths_and_the_first_place_as_it_is():
    values = noise(2, 3, 12, 8)
    turned = rotate(values, rotary_positions(3, 4, 8))
    torch.testing.assert_close(turned.norm(dim=-1), values.norm(dim=-1), rtol=1e-6, atol=0)
    assert torch.equal(turned[:, :, 0], values[:, :, 0])


def test_a_block_begins_as_the_identity_and_learns_from_the_start():
    torch.manual_seed(0)
    block, tokens = TransformerBlock(8, 2), noise(2, 5, 8, dtype=torch.float32)
    out = block(tokens)
    assert torch.equal(out, tokens)
    out.square().sum().backward()
    assert block.gather.weight.grad.abs().sum() > 0
    assert block.narrow.weight.grad.abs().sum() > 0


def test_every_weight_has_a_share_in_the_output():
    block = awake()
    block(noise(2, 6, 16), rotary_positions(2, 3, 8)).square().sum().backward()
    assert [name for name, p in block.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_gradients_are_those_of_finite_differences():
    block, rotary = awake(8, 1), rotary_positions(1, 3, 8)
    mask = torch.tensor([[True, True, False]])
    assert torch.autograd.gradcheck(lambda tokens: block(tokens, rotary, mask), noise(1, 3, 8).requires_grad_())


@pytest.mark.parametrize("masked", [False, True])
def test_half_the_bits_give_nearly_the_same(masked):
    block, tokens, rotary = awake(dtype=torch.float32), noise(2, 6, 16, dtype=torch.float32), rotary_positions(2, 3, 8)
    mask = torch.arange(6) < torch.tensor([[6], [4]]) if masked else None
    expected = block(tokens, rotary, mask)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = block(tokens, rotary, mask)
    assert mixed.dtype == torch.float32, "what blocks add to keeps its precision"
    torch.testing.assert_close(mixed, expected, rtol=0.05, atol=0.05)
    cast = block.bfloat16()(tokens.bfloat16(), rotary, mask)
    assert cast.dtype == torch.bfloat16
    torch.testing.assert_close(cast.float(), expected, rtol=0.1, atol=0.1)


def test_widths_that_do_not_divide_are_named():
    with pytest.raises(UsageError, match="^TransformerBlock: width must be a multiple of heads=3, got 16$"):
        TransformerBlock(16, 3)
    with pytest.raises(UsageError, match="^rotary positions need heads of a multiple of 4 channels, got 6$"):
        rotary_positions(2, 2, 6)
