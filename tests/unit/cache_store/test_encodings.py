"""Encodings: what a row decodes to, how far that is from what it was, and what packed shards refuse."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast, get_args

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from running import Lab
from torch import Tensor

from cache_store.errors import CorruptShard
from cache_store.formats import codec, packed
from cache_store.formats.codec import Field
from cache_store.formats.dtypes import STORED
from cache_store.formats.encoded_rows import EncodedRows
from cache_store.formats.encodings import ENCODINGS, Column, Encoding, EncodingName
from cache_store.snapshots.spec import SetSpec
from cache_store.snapshots.store import SnapshotStore
from cache_store.storage.open import open_storage
from orchestrator.costs import formulas

BLOCK = {"int8": 32, "fp8": 128}
FLOATS = ("float32", "bfloat16", "float16")
SHAPES = ((32,), (20,), (128,), (300,), (4, 3, 5), (3, 1, 1))


def rows(shape: tuple[int, ...], dtype: str, seed: int = 0, spread: float = 3.0) -> Tensor:
    """Rows whose channels and values differ by orders of magnitude, as hidden states do."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn((7, *shape), generator=draw)
    return (values * torch.exp(spread * torch.randn((7, *shape), generator=draw))).clamp(-6e4, 6e4).to(DTYPE[dtype])


DTYPE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def scales_of(encoding: EncodedRows, field: Field, stored: tuple[Tensor, ...]) -> Tensor:
    """The scale of every value, found without the code under test."""
    scale = stored[1].double()
    if len(field.shape) == 3:
        return scale[:, :, None, None].expand(-1, *field.shape)
    return scale.repeat_interleave(BLOCK[encoding.name], dim=-1)[..., : field.shape[-1]]


@pytest.mark.parametrize("dtype", FLOATS)
@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 10**6), spread=st.floats(0, 4))
@settings(max_examples=40, deadline=None)
def test_int8_is_at_most_half_a_scale_off(dtype: str, shape: tuple[int, ...], seed: int, spread: float) -> None:
    field = Field("x", dtype, shape)
    encoding = EncodedRows("int8", (field,))
    values = rows(shape, dtype, seed, spread)
    stored = encoding.encode([values])
    (decoded,) = encoding.decode(stored)
    scale = scales_of(encoding, field, stored)
    # The decoded value is rounded to its type once more.
    rounding = torch.finfo(decoded.dtype).eps / 2 * values.double().abs() + 1e-7
    error = (decoded.double() - values.double()).abs()
    assert (error <= scale * 0.5000005 + rounding * 1.01).all()
    # And the scale is no larger than the block's largest value asks for.
    assert (scale <= values.double().abs().amax() / 127 * 1.000001 + torch.finfo(torch.float32).tiny).all()


@pytest.mark.parametrize("dtype", FLOATS)
@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 10**6), spread=st.floats(0, 2))
@settings(max_examples=40, deadline=None)
def test_fp8_is_at_most_a_sixteenth_off_and_decodes_as_torch_says(
    dtype: str, shape: tuple[int, ...], seed: int, spread: float
) -> None:
    field = Field("x", dtype, shape)
    encoding = EncodedRows("fp8", (field,))
    values = rows(shape, dtype, seed, spread)
    stored = encoding.encode([values])
    (decoded,) = encoding.decode(stored)
    scale = scales_of(encoding, field, stored)
    error = (decoded.double() - values.double()).abs()
    rounding = torch.finfo(decoded.dtype).eps * values.double().abs()
    # Three bits of mantissa above 2^-6, steps of 2^-9 below.
    assert (error <= (values.double().abs() / 16).maximum(scale * 2**-10) * 1.00001 + rounding + 1e-7).all()
    expected = (stored[0].float() * scales_of(encoding, field, stored).float()).to(decoded.dtype)
    assert torch.equal(decoded, expected)


def test_every_float8_code_decodes_as_torch_converts_it() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes = codes[codes.float().isfinite()]
    encoding = EncodedRows("fp8", (Field("x", "float32", (len(codes),)),))
    scale = torch.full((1, encoding.fields[1].shape[0]), 0.75)
    (decoded,) = encoding.decode((codes.view(1, -1), scale))
    assert torch.equal(decoded[0], codes.float() * 0.75)


@pytest.mark.parametrize("name", ["int8", "fp8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_decodes_alike_in_any_batch_and_encodes_the_same_again(name: EncodingName, shape: Any) -> None:
    """What reading, rolling forward and rebuilding rely on."""
    encoding = EncodedRows(name, (Field("x", "bfloat16", shape),))
    values = rows(shape, "bfloat16")
    stored = encoding.encode([values])
    (whole,) = encoding.decode(stored)
    for first, last in pairwise((0, 1, 4, 7)):
        part = encoding.encode([values[first:last]])
        assert all(
            torch.equal(a.view(torch.int8), b[first:last].view(torch.int8)) for a, b in zip(part, stored, strict=True)
        )
        assert torch.equal(encoding.decode(part)[0], whole[first:last])


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_zeros_the_largest_and_the_smallest_values_survive(name: EncodingName) -> None:
    for dtype, largest in (("float16", 65504.0), ("bfloat16", 3e38), ("float32", 3.4e38)):
        encoding = EncodedRows(name, (Field("x", dtype, (4,)),))
        values = torch.tensor([[0.0, 0.0, 0.0, 0.0], [largest, 0.0, -largest, 1.0]]).to(DTYPE[dtype])
        (decoded,) = encoding.decode(encoding.encode([values]))
        assert torch.equal(decoded[:, :3], values[:, :3])
    encoding = EncodedRows(name, (Field("x", "float32", (2,)),))
    stored = encoding.encode([torch.tensor([[1e-42, -1e-45]])])
    assert stored[1].min() >= torch.finfo(torch.float32).tiny, "no quotient of subnormal numbers"
    assert encoding.decode(stored)[0].abs().max() <= 1e-38


@pytest.mark.parametrize("name", ["int8", "fp8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_makes_its_block_nan_and_no_other(name: EncodingName, bad: float) -> None:
    size = BLOCK[name]
    encoding = EncodedRows(name, (Field("x", "float32", (2 * size,)),))
    values = torch.ones(1, 2 * size)
    values[0, size + 3] = bad
    (decoded,) = encoding.decode(encoding.encode([values]))
    assert decoded[0, :size].isfinite().all()
    assert decoded[0, size:].isnan().all()


@pytest.mark.parametrize("name", ["plain", "lossless", "int8", "fp8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_bytes_a_plan_counts_are_those_of_the_stored_fields(name: EncodingName, shape: Any) -> None:
    fields = (Field("identity", "bfloat16", shape), Field("path", "bfloat16", shape))
    encoding = EncodedRows(name, fields)
    assert sum(field.bytes for field in encoding.fields) == 2 * ENCODINGS[name].row_bytes("bfloat16", shape)
    stored = encoding.encode([rows(shape, "bfloat16")] * 2)
    assert [tuple(tensor.shape[1:]) for tensor in stored] == [field.shape for field in encoding.fields]
    assert [str(tensor.dtype).removeprefix("torch.") for tensor in stored] == [f.dtype for f in encoding.fields]


def test_int8_takes_a_little_more_than_half_of_bfloat16() -> None:
    assert ENCODINGS["int8"].row_bytes("bfloat16", (576,)) == 576 + 18 * 4
    assert ENCODINGS["fp8"].row_bytes("bfloat16", (576,)) == 576 + 5 * 4
    assert ENCODINGS["int8"].row_bytes("bfloat16", (64, 8, 8)) == 64 * 64 + 64 * 4


# The table


class Half(Encoding):
    """A row added: values as float16, and what was one larger than that as the largest float16."""

    def columns(self, dtype: str, shape: tuple[int, ...]) -> tuple[Column, ...]:
        return (Column("half", "float16", shape),)

    def identity(self) -> dict[str, Any]:
        return {"name": "half"}

    def encode(self, rows: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        return (rows.float().clamp(-65504, 65504).half(),)

    def decode(self, stored: Sequence[Tensor], dtype: str, shape: tuple[int, ...]) -> Tensor:
        return stored[0].to(DTYPE[dtype])


def test_every_encoding_with_a_row_has_a_name_and_the_other_way_round() -> None:
    assert get_args(EncodingName) == tuple(ENCODINGS)
    assert [name for name, row in ENCODINGS.items() if row.identity() is None] == ["plain", "lossless"]
    assert ENCODINGS["int8"].identity() == {"name": "int8", "block": 32, "version": 1}
    assert ENCODINGS["fp8"].identity() == {"name": "fp8", "block": 128, "version": 1}


def test_a_set_is_written_and_read_with_an_encoding_that_was_only_entered_as_a_row(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(ENCODINGS, "half", Half())
    encoding = EncodedRows("half", (Field("a", "float32", (5,)), Field("b", "bfloat16", (2, 3, 3))))
    assert [(field.name, field.dtype) for field in encoding.fields] == [("a.half", "float16"), ("b.half", "float16")]
    assert ENCODINGS["half"].row_bytes("float32", (5,)) == 10
    spec = SetSpec({"k": ENCODINGS["half"].identity()}, 7, encoding.fields, 7, 7, codec_version=encoding.codec_version)
    snapshots = SnapshotStore(open_storage(f"memory://{uuid.uuid4().hex}")).open(spec)
    values = [rows((5,), "float32"), rows((2, 3, 3), "bfloat16")]
    assert snapshots.put(0, [tensor.numpy() for tensor in encoding.encode(values)]) > 0
    decoded = encoding.decode([torch.from_numpy(array.copy()) for array in snapshots.shard(0)])
    assert [tensor.dtype for tensor in decoded] == [torch.float32, torch.bfloat16]
    assert torch.equal(decoded[0], values[0].half().float())
    assert (decoded[1] - values[1]).abs().max() <= values[1].abs().max() * 2**-8


def test_a_plan_counts_and_a_stage_stores_in_an_encoding_that_was_only_entered_as_a_row(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything between the configuration and the shards takes it by its name."""
    monkeypatch.setitem(ENCODINGS, "half", Half())
    assert formulas.row_bytes([(4,), (2, 3, 3)], "float32", cast(EncodingName, "half")) == 2 * (4 + 18)
    monkeypatch.setitem(ENCODINGS, "int8", Half())
    lab = Lab.make(tmp_path, {"snapshots.encoding": "int8", "training.epochs": 1, "training.precision": "fp32"})
    lab.run_all()
    sets = [found for found in SnapshotStore(lab.storage).list() if found.key.get("encoding") == {"name": "half"}]
    assert sets
    assert all(found.shards_present == found.shards for found in sets)
    for found in sets:
        stored = SnapshotStore(lab.storage).load(found.id)
        assert {field.dtype for field in stored.spec.fields} == {"float16"}


# Packed shards


def packed_bytes(fields: tuple[Field, ...], arrays: list[np.ndarray]) -> bytes:
    return b"".join(bytes(piece) for piece in packed.encode(fields, arrays))


@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(STORED)), st.lists(st.integers(1, 5), max_size=3)), min_size=1, max_size=4
    ),
    st.integers(1, 40),
    st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_packed_shards_give_back_every_bit(kinds: list[tuple[str, list[int]]], count: int, seed: int) -> None:
    """Random bits: NaN payloads, infinities, negative zero and subnormal numbers among them."""
    fields = tuple(Field(f"f{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(kinds))
    draw = np.random.default_rng(seed)
    arrays = [
        np.frombuffer(draw.bytes(field.bytes * count), field.numpy_dtype).reshape(count, *field.shape)
        for field in fields
    ]
    found = packed.decode(packed_bytes(fields, arrays), fields, count)
    for array, expected in zip(found, arrays, strict=True):
        assert array.tobytes() == expected.tobytes()
        assert array.shape == expected.shape
        assert not array.flags.writeable


X = (Field("x", "bfloat16", (16,)),)


def smooth(count: int) -> list[np.ndarray]:
    return [(np.arange(count * 16, dtype=np.uint32) // 7 % 65536).astype(np.uint16).reshape(count, 16)]


def test_packing_makes_what_repeats_smaller_and_the_same_bytes_each_time() -> None:
    data = packed_bytes(X, smooth(4000))
    assert len(data) < 4000 * 32 / 4
    assert data == packed_bytes(X, smooth(4000))
    assert pa.ipc.open_file(data).read_all().column_names == ["x.0", "x.1"]


def test_any_other_rows_fields_or_layout_is_refused() -> None:
    data, plain = packed_bytes(X, smooth(8)), b"".join(bytes(piece) for piece in codec.encode(X, smooth(8)))
    others: list[tuple[bytes, tuple[Field, ...], int]] = [
        (data, X, 7),
        (data, X, 9),
        (data, X, 1 << 40),
        (data, (Field("y", "bfloat16", (16,)),), 8),
        (data, (Field("x", "float16", (16,)),), 8),
        (data, (*X, *X), 8),
        (data, (Field("x", "float32", (8,)),), 8),
        (plain, X, 8),
        (data[:-1], X, 8),
        (b"", X, 8),
    ]
    for buffer, fields, count in others:
        with pytest.raises(CorruptShard):
            packed.decode(buffer, fields, count)
    with pytest.raises(CorruptShard):
        codec.decode(data, X, 8)


@pytest.mark.parametrize("length", [0, 255, 257, 1 << 30])
def test_a_frame_of_another_length_than_the_geometrys_is_refused(length: int) -> None:
    """Also one that would unpack to a gigabyte: nothing but the set says how much memory is taken."""
    zstd = pa.Codec("zstd")
    frame = np.frombuffer(zstd.compress(bytes(min(length, 1 << 24)) * max(1, length >> 24)), np.uint8)
    right = np.frombuffer(zstd.compress(bytes(256)), np.uint8)
    fields = X
    planes = [Field("x.0", "uint8", (len(frame),)), Field("x.1", "uint8", (len(right),))]
    metadata = (*codec.describe(fields, codec.PACKED), ("segprop.rows", "16"))
    data = b"".join(bytes(piece) for piece in codec.encode_columns(planes, [frame, right], 1, metadata))
    before = pa.total_allocated_bytes()
    with pytest.raises(CorruptShard):
        packed.decode(data, fields, 16)
    assert pa.total_allocated_bytes() - before < 1 << 20


def test_no_flipped_bit_of_a_packed_shard_gives_an_array_of_another_shape() -> None:
    data = packed_bytes(X, smooth(8))
    refused = 0
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        try:
            (array,) = packed.decode(bytes(damaged), X, 8)
        except CorruptShard:
            refused += 1
            continue
        assert (array.shape, array.dtype) == ((8, 16), np.uint16)
    assert refused > 100


@pytest.mark.parametrize("storage", ["local", "memory"])
def test_a_damaged_packed_shard_is_quarantined_and_can_be_put_again(storage: str, tmp_path: Any) -> None:
    found = open_storage(str(tmp_path / "store") if storage == "local" else f"memory://{uuid.uuid4().hex}")
    spec = SetSpec({"k": 1}, 20, X, 4, 8, codec_version=codec.PACKED)
    snapshots = SnapshotStore(found).open(spec)
    for i in range(spec.shards):
        assert snapshots.put(i, smooth(len(spec.shard_range(i)))) > 0
    (name,) = [n for n in found.list(f"sets/{spec.id}/shards") if n.startswith("000001")]
    path = f"sets/{spec.id}/shards/{name}"
    data = bytearray(found.read(path))
    data[len(data) // 2] ^= 1
    found.delete(path)
    found.write(path, bytes(data))
    again = SnapshotStore(found).load(spec.id)
    with pytest.raises(CorruptShard):
        again.shard(1)
    assert again.missing() == [1]
    assert again.put(1, smooth(8)) > 0
    assert [len(again.shard(i)[0]) for i in range(spec.shards)] == [8, 8, 4]
    assert again.shard(1)[0].tobytes() == smooth(8)[0].tobytes()


def test_a_codec_is_part_of_a_sets_id_and_others_are_refused() -> None:
    plain, other = SetSpec({"k": 1}, 20, X, 4, 8), SetSpec({"k": 1}, 20, X, 4, 8, codec_version=2)
    assert plain.id != other.id
    assert plain.to_json()["codec"] == 1
    assert SetSpec.from_json(other.to_json()) == other
    for version in (0, 3, "1", None):
        with pytest.raises(ValueError, match="codec version"):
            SetSpec.from_json({**plain.to_json(), "codec": version})
