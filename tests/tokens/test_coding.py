import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_decoder import ReferenceDecoder

from provq.errors import UserError
from provq.tokens.coding import CODINGS, AdaptiveCoding, PriorCoding, StaticCoding, frequencies, frequencies_of_floats
from provq.tokens.packing import Reader, as_bytes

SOME_BYTES = 16


@st.composite
def messages(draw):
    """Indices from alphabets and distributions of every kind, and the number of codes."""
    size = draw(st.sampled_from([1, 2, 3, 17, 256, 1024, 1 << 18]))
    count = draw(st.sampled_from([0, 1, 2, 63, 200, 2000]))
    sharpness = draw(st.sampled_from([0.0, 0.5, 2.0, 50.0]))
    chance = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return drawn(chance, size, count, sharpness), size


def drawn(chance, size, count, sharpness):
    weights = np.exp(sharpness * chance.standard_normal(min(size, 4096)))
    places = chance.permutation(size)[: len(weights)]
    return places[chance.choice(len(weights), count, p=weights / weights.sum())].astype(np.int64)


def bits_of_static(indices):
    """The entropy of how often codes occur, times their number."""
    counts = np.unique(indices, return_counts=True)[1]
    return float(-(counts * np.log2(counts / counts.sum())).sum())


def bits_of_adaptive(indices, size):
    """What the model gives each index, from its description: (seen + 1/2) / (all seen + size/2)."""
    seen, of_block, begin, bits = {}, [], 0, 0.0
    for place, index in enumerate(indices.tolist()):
        bits -= np.log2((seen.get(index, 0) + 0.5) / (begin + size / 2))
        of_block.append(index)
        if len(of_block) == max(1, begin // 32):
            for each in of_block:
                seen[each] = seen.get(each, 0) + 1
            of_block, begin = [], place + 1
    return bits


def is_close(data, bits):
    return bits / 8 - SOME_BYTES <= len(data) <= 1.005 * bits / 8 + SOME_BYTES


@pytest.mark.parametrize("coding", CODINGS.values(), ids=list(CODINGS))
@given(message=messages())
@settings(max_examples=20, deadline=None)
def test_what_is_decoded_is_what_was_encoded(coding, message):
    indices, size = message
    data = coding.encode(indices, size)
    decoded = coding.decode(data, len(indices), size)
    assert decoded.dtype == np.int64 and np.array_equal(decoded, indices)


@given(message=messages())
@settings(max_examples=20, deadline=None)
def test_sizes_are_those_of_the_models(message):
    indices, size = message
    assert is_close(AdaptiveCoding().encode(indices, size), bits_of_adaptive(indices, size))
    static = StaticCoding().encode(indices, size)
    reader = Reader(static)
    histogram = reader.number(len(static), "")
    assert is_close(static[reader.place + histogram :], bits_of_static(indices))


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 3.0])
def test_what_a_model_must_learn_or_be_told_is_within_a_percent_of_long_messages(sharpness):
    indices = drawn(np.random.default_rng(1), 512, 200_000, sharpness)
    entropy = bits_of_static(indices)
    for coding in CODINGS.values():
        assert 8 * len(coding.encode(indices, 512)) < 1.01 * entropy, coding.name


def test_static_payload_is_read_without_the_library():
    indices = drawn(np.random.default_rng(2), 300, 500, 1.0)
    data = StaticCoding().encode(indices, 300)
    reader = Reader(data)
    reader.part(reader.number(len(data), ""), "")
    used, counts = np.unique(indices, return_counts=True)
    decoder = ReferenceDecoder(data[reader.place :])
    assert [used[decoder.take(frequencies(counts))] for _ in range(500)] == indices.tolist()


def test_adaptive_payload_is_read_without_the_library():
    indices = drawn(np.random.default_rng(3), 1000, 300, 2.0)
    decoder = ReferenceDecoder(AdaptiveCoding().encode(indices, 1000))
    counts, begin, block = np.zeros(1000, np.int64), 0, []
    for place, index in enumerate(indices.tolist()):
        assert decoder.take(frequencies(2 * counts + 1)) == index
        block.append(index)
        if len(block) == max(1, begin // 32):
            np.add.at(counts, block, 1)
            block, begin = [], place + 1


@given(weights=st.lists(st.integers(0, 1 << 36), min_size=1, max_size=300).filter(any))
@settings(deadline=None)
def test_frequencies_are_whole_positive_and_sum_to_two_to_the_24(weights):
    found = frequencies(np.array(weights, np.int64))
    assert found.dtype == np.int64 and found.min() >= 1 and found.sum() == 1 << 24
    share = np.array(weights) / sum(weights)
    assert np.abs(found / 2**24 - share).max() < (len(weights) + 2) / 2**24


def test_frequencies_are_these_on_every_machine():
    assert frequencies(np.array([1, 2, 3])).tolist() == [2796202, 5592406, 8388608]
    assert frequencies(np.array([0, 1 << 50, 0])).tolist() == [1, (1 << 24) - 2, 1]
    assert frequencies_of_floats(np.array([0.1, 0.2, 0.3])).tolist() == [2796202, 5592405, 8388609]


def test_frequencies_of_floats_do_not_depend_on_their_scale_or_kind():
    values = np.random.default_rng(0).random(1000).astype(np.float32)
    expected = frequencies_of_floats(values)
    assert np.array_equal(frequencies_of_floats(values.astype(np.float64) * 2.0**-300), expected)
    with pytest.raises(UserError, match="one finite probability"):
        frequencies_of_floats(np.array([0.5, np.nan]))
    with pytest.raises(UserError, match="none below zero"):
        frequencies_of_floats(np.array([0.5, -0.5]))
    with pytest.raises(UserError, match="not all zero"):
        frequencies_of_floats(np.zeros(3))


def bigram(table):
    return lambda before: table[before[-1]] if len(before) else np.ones(len(table))


def test_a_bigram_prior_codes_to_its_own_entropy():
    chance = np.random.default_rng(5)
    table = chance.dirichlet(np.full(64, 0.05), 64)
    indices = [0]
    for _ in range(3000):
        indices.append(chance.choice(64, p=table[indices[-1]]))
    indices = np.array(indices)
    coding = PriorCoding(bigram(table))
    data = coding.encode(indices)
    assert np.array_equal(coding.decode(data, len(indices)), indices)
    bits = np.log2(64) - np.log2(table[indices[:-1], indices[1:]]).sum()
    assert is_close(data, bits)
    assert len(data) < 0.6 * len(AdaptiveCoding().encode(indices, 64)), "the prior knows more than counts do"


@given(seed=st.integers(0, 2**32 - 1), sharpness=st.sampled_from([0.0, 3.0, 300.0]))
@settings(max_examples=30, deadline=None)
def test_priors_of_any_shape_decode(seed, sharpness):
    """Also with codes that the prior holds to be impossible, and with codebooks that take turns."""
    chance = np.random.default_rng(seed)
    tables = [
        np.exp((sharpness * chance.standard_normal(size)).clip(-80, 80)).astype(np.float32) for size in (1, 5, 300)
    ]
    tables[2][chance.integers(300, size=100)] = 0
    coding = PriorCoding(lambda before: tables[len(before) % 3])
    indices = np.array([chance.integers(len(tables[place % 3])) for place in range(50)])
    assert np.array_equal(coding.decode(coding.encode(indices), 50), indices)


def test_another_prior_is_noticed():
    table = np.random.default_rng(6).dirichlet(np.ones(16), 16)
    indices = np.random.default_rng(7).integers(0, 16, 400)
    data = PriorCoding(bigram(table)).encode(indices)
    with pytest.raises(UserError, match="other probabilities|damaged"):
        PriorCoding(bigram(table[::-1])).decode(data, 400)


@pytest.mark.parametrize("coding", CODINGS.values(), ids=list(CODINGS))
def test_what_cannot_be_coded_is_refused(coding):
    with pytest.raises(UserError, match="index 4 is out of range"):
        coding.encode(np.array([0, 4, 1]), 4)
    with pytest.raises(UserError, match="index -1 is out of range"):
        coding.encode(np.array([0, -1]), 4)
    with pytest.raises(UserError, match="cannot be coded"):
        coding.encode(np.array([0]), 1 << 23)


@pytest.mark.parametrize("coding", CODINGS.values(), ids=list(CODINGS))
@given(junk=st.binary(max_size=60), count=st.integers(0, 50))
@settings(max_examples=100, deadline=None)
def test_junk_gives_indices_in_range_or_one_clear_error(coding, junk, count):
    try:
        found = coding.decode(junk, count, 37)
    except UserError:
        return
    assert found.shape == (count,) and ((found >= 0) & (found < 37)).all()


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(UserError, match=r"provq\[bitstream\]"):
        AdaptiveCoding().encode(np.array([0, 1]), 2)


@given(numbers=st.lists(st.integers(0, 2**63 - 1)))
def test_numbers_come_back(numbers):
    reader = Reader(as_bytes(numbers))
    assert reader.numbers(len(numbers), 2**63 - 1, "a number") == numbers and reader.left == 0
