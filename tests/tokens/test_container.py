import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from provq.errors import UsageError, UserError
from provq.tokens.container import Entry, pack, read, read_prefix, unpack, write
from provq.tokens.packing import as_bytes, deflated

FINGERPRINT = "0123456789ab"
SIZES = (16, 300, 1)


def entries(count=3, sizes=SIZES, seed=0):
    chance = np.random.default_rng(seed)
    found = []
    for number in range(count):
        shape = tuple(chance.integers(1, 6, 2))
        indices = np.stack([chance.integers(0, size, shape) for size in sizes], -1)
        found.append(Entry(f"folder/{number}.png", (int(shape[0]) * 8 - 3, int(shape[1]) * 8), indices))
    return found


def packed(of=None, **changes):
    about = {"fingerprint": FINGERPRINT, "codebook_sizes": SIZES, **changes}
    return pack(entries() if of is None else of, **about)


def same(found, expected):
    return len(found) == len(expected) and all(
        one.key == other.key and one.size == other.size and np.array_equal(one.indices, other.indices)
        for one, other in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("coding", ["static", "adaptive"])
def test_what_is_read_is_what_was_written(coding, tmp_path):
    about = {"fingerprint": FINGERPRINT, "codebook_sizes": SIZES, "coding": coding}
    length = write(tmp_path / "deep" / "f.pvq", entries(), **about)
    assert length == (tmp_path / "deep" / "f.pvq").stat().st_size
    contents = read(tmp_path / "deep" / "f.pvq")
    assert same(contents.entries, entries())
    assert contents.fingerprint == FINGERPRINT and contents.codebook_sizes == SIZES and contents.coding == coding
    assert contents.ends[-1] == length


keys = st.text(st.characters(codec="utf-8"), max_size=20)
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@given(
    named=st.lists(st.tuples(keys, st.lists(st.integers(0, 1 << 20), max_size=3).map(tuple), shapes), max_size=5),
    sizes=st.lists(st.sampled_from([1, 2, 700, 1 << 18]), min_size=1, max_size=4),
    coding=st.sampled_from(["static", "adaptive"]),
    gaps=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_items_of_every_shape_and_name_come_back(named, sizes, coding, gaps, seed):
    chance = np.random.default_rng(seed)
    written = []
    for key, size, shape in named:
        indices = np.stack([chance.integers(-1 if gaps else 0, codes, shape) for codes in sizes], -1)
        written.append(Entry(key, size, indices.astype(np.int64)))
    data = pack(written, fingerprint=FINGERPRINT, codebook_sizes=sizes, coding=coding)
    assert same(unpack(data).entries, written)


def test_names_of_files_that_are_no_text_come_back():
    key = b"caf\xe9.png".decode(errors="surrogateescape")
    item = Entry(key, (8, 8), np.zeros((1, 1, 3), np.int64))
    assert unpack(packed([item])).entries[0].key == key


@pytest.mark.parametrize("coding", ["static", "adaptive"])
def test_one_byte_that_differs_anywhere_is_found(coding):
    data = packed(coding=coding)
    for place in range(len(data)):
        for change in (0x01, 0x80, 0xFF):
            damaged = bytearray(data)
            damaged[place] ^= change
            with pytest.raises(UserError):
                unpack(bytes(damaged))


def test_a_file_cut_anywhere_is_refused_and_longer_ones_too():
    data = packed()
    for length in range(len(data)):
        with pytest.raises(UserError):
            unpack(data[:length])
    with pytest.raises(UserError, match="goes on for 1 bytes"):
        unpack(data + b"\0")


def test_prefixes_decode_from_the_front_of_the_file(tmp_path):
    data = packed()
    ends = unpack(data).ends
    for stages, end in enumerate(ends, 1):
        expected = [
            Entry(entry.key, entry.size, np.where(np.arange(len(SIZES)) < stages, entry.indices, -1))
            for entry in entries()
        ]
        path = tmp_path / f"{stages}.pvq"
        path.write_bytes(data[:end])
        assert same(read_prefix(path, stages).entries, expected)
        assert same(unpack(data, stages).entries, expected), "what follows is not looked at"
        path.write_bytes(data[: end - 1])
        with pytest.raises(UserError, match=f"cut off in stage {stages} of 3"):
            read_prefix(path, stages)
    with pytest.raises(UserError, match="the first 2 can be read by themselves"):
        unpack(data[: ends[1]])
    with pytest.raises(UsageError, match="stages must be in 1 to 3"):
        unpack(data, 4)


def test_damage_behind_a_prefix_does_not_hurt_it_and_damage_before_does():
    data = bytearray(packed())
    ends = unpack(bytes(data)).ends
    data[ends[0]] ^= 1
    assert same(unpack(bytes(data), 1).entries, unpack(packed(), 1).entries)
    with pytest.raises(UserError, match="stage 2 is damaged"):
        unpack(bytes(data), 2)


def test_stages_that_changed_places_are_found():
    """Each checksum covers all that lies before it."""
    indices = np.random.default_rng(0).integers(0, 256, (5, 5, 2))
    data = packed([Entry("a", (8, 8), indices)], codebook_sizes=(256, 256))
    first, second = unpack(data).ends
    length = second - first
    begin = first - length
    with pytest.raises(UserError, match="stage 1 is damaged"):
        unpack(data[:begin] + data[first:] + data[begin:first])


def test_other_files_and_versions_are_told_apart(tmp_path):
    with pytest.raises(UserError, match="no file of coded tokens"):
        unpack(b"PK\x03\x04 something else")
    data = bytearray(packed())
    data[4] = 2
    with pytest.raises(UserError, match="version 2, .* update provq"):
        unpack(bytes(data))
    with pytest.raises(UserError, match="f.pvq is not there"):
        read(tmp_path / "f.pvq")
    (tmp_path / "f.pvq").write_bytes(b"")
    with pytest.raises(UserError, match="f.pvq: it is no file of coded tokens"):
        read(tmp_path / "f.pvq")


def forged(rows, sizes=(16,), payload=b""):
    """A file with true checksums whose header was made to do harm."""
    import zlib

    described = [number for size in sizes for number in (size, len(payload) << 1)]
    header = as_bytes([1, 6]) + bytes(6) + as_bytes([len(sizes), *described, len(rows)])
    header += deflated(as_bytes([number for row in rows for number in row]))
    data = b"\x89PVQ\x01" + as_bytes([len(header)]) + header
    data += zlib.crc32(data).to_bytes(4, "little")
    return data


@pytest.mark.parametrize(
    "rows",
    [
        [(0, 2, 8, 8, 2, 1 << 26, 1 << 26)],
        [(0, 0, 3, 0, 1 << 26, 1 << 26)],
        [(0, 2, 8, 8, 1, 1 << 26)] * 3,
        [(1 << 30, 0, 0)],
        [(0, 200, *[1] * 200, 0)],
        [(0, 0, 200, *[0] * 200)],
        [(5, 0, 0)],
    ],
)
def test_forged_headers_cannot_ask_for_the_world(rows):
    with pytest.raises(UserError):
        unpack(forged(rows))


def test_a_table_that_inflates_without_end_is_refused(monkeypatch):
    monkeypatch.setattr("provq.tokens.container._LONGEST_TABLE", 1000)
    with pytest.raises(UserError, match="holds more than 1,000 bytes"):
        unpack(forged([(0, 0, 0)] * 2000))


def test_what_a_file_cannot_hold_is_refused_when_it_is_written():
    with pytest.raises(UsageError, match="did you mean 'static'"):
        packed(coding="statik")
    with pytest.raises(UserError, match="index 16 is out of range"):
        packed([Entry("a", (8, 8), np.full((1, 1, 3), 16))])
    with pytest.raises(UserError, match="index -2"):
        packed([Entry("a", (8, 8), np.full((1, 1, 3), -2))])
    with pytest.raises(UserError, match="there are 3 codebooks"):
        packed([Entry("a", (8, 8), np.zeros((1, 1, 2), np.int64))])
    with pytest.raises(UserError, match="longer name"):
        packed([Entry("a" * 5000, (8, 8), np.zeros((1, 1, 3), np.int64))])


def test_what_a_file_costs_beside_its_tokens():
    """One picture of 64 tokens of 1,024 codes: 80 bytes of tokens, and the frame around them."""
    indices = np.random.default_rng(0).integers(0, 1024, (8, 8, 1))
    data = pack([Entry("a.png", (64, 64), indices)], fingerprint=FINGERPRINT, codebook_sizes=(1024,))
    assert len(data) < 80 + 60
