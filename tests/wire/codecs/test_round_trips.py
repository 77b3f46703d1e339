"""Encoding and decoding: every size, every dtype, and bit for bit what a quantiser written number by number gives."""

import math

import numpy as np
import pytest
import torch

from fedloom.errors import MessageError
from fedloom.randomness import generator
from fedloom.tensors import largest_value
from fedloom.wire.messages import Payload, StoredTensors, decode, encode
from fedloom.wire.schema import Schema, TensorSpec

SIZES = (0, 1, 63, 64, 65, 4097)

CODECS = [
    "bf16",
    "fp16|zstd",
    "int8",
    "int4",
    "int4:nearest,block=24",
    "int3|zstd",
    "small",
    "ternary:nearest,block=10",
    "nf4|zstd",
    "sign:block=64",
    "sign:block=65536|zstd",
    "top_k:0.1",
    "top_k:0.3|int4|zstd",
    "random_k:0.25|int8",
    "low_rank:2",
    "low_rank:3|int8|zstd",
    "zstd",
]


def rng(name):
    return generator(7, f"codec/{name}", 3, 1)


def ordinary(size):
    return torch.randn(size, generator=torch.Generator().manual_seed(size)) * 1e-4


def outlier(size):
    own = ordinary(size)
    own[size // 2 : size // 2 + 1] = 1000.0
    return own


KINDS = {
    "ordinary": ordinary,
    "zeros": torch.zeros,
    "outlier": outlier,
    "subnormal": lambda size: ordinary(size) * 1e-36,
    "huge": lambda size: ordinary(size).sign() * 2.0**120,
}


def sent(tensors, codec, generators=rng):
    """Encode and decode tensors of one codec; return the bytes, the schema and what comes back."""
    schema = Schema.of(tensors).coded(lambda spec: codec)
    data = encode(Payload(tensors), schema, generators)
    assert len(data) <= schema.max_bytes
    return data, schema, decode(data, schema).tensors


# what multiplies, or has a smaller range, does not code the largest numbers that there may be
EVERY = [
    (codec, kind)
    for codec in CODECS
    for kind in KINDS
    if kind != "huge" or not codec.startswith(("fp16", "random_k", "low_rank"))
]


@pytest.mark.parametrize(("codec", "kind"), EVERY)
def test_every_size_comes_back_in_its_shape_and_near(codec, kind):
    tensors = {f"x{size}": KINDS[kind](size) for size in SIZES} | {
        "m": KINDS[kind](600).view(20, 30)
    }
    data, schema, back = sent(tensors, codec)
    assert list(back) == list(tensors)
    for name, own in tensors.items():
        assert back[name].shape == own.shape and back[name].dtype == own.dtype
        assert math.isfinite(largest_value(back[name]))
        wide = 4.1 if codec.startswith("random_k") else 2.0  # K of d numbers, d / K times as large
        assert largest_value(back[name]) <= wide * max(
            largest_value(own), 2.0**-126 * (kind != "zeros")
        )
        if kind == "zeros":
            assert not back[name].any()
    if codec == "zstd":
        assert all(torch.equal(back[name], own) for name, own in tensors.items())
    assert encode(Payload(tensors), schema, rng) == data


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("codec", ["int8", "top_k:0.5|int4", "low_rank:2", "zstd", "bf16"])
def test_floats_of_every_kind_come_back_as_they_were_declared(codec, dtype):
    own = ordinary(400).view(20, 20).to(dtype)
    _, _, back = sent({"x": own}, codec)
    assert back["x"].dtype == dtype
    assert codec != "zstd" or torch.equal(back["x"], own)


def bfloat16_up(value):
    """The smallest bfloat16 not below a positive number."""
    bits = int(np.float32(value).view(np.uint32))
    return np.uint32(-(-bits // 65536) * 65536).view(np.float32)


def by_hand(values, largest, block, words):
    """Quantise number by number; ``words``: of 16 bits, for stochastic rounding."""
    found = []
    for start in range(0, len(values), block):
        own = values[start : start + block]
        most = max(abs(x) for x in own)
        scale = np.float32(1)
        if most:
            scale = bfloat16_up(max(np.float32(most) / np.float32(largest), np.float32(2.0**-126)))
        for place, x in enumerate(own):
            level = np.float32(x) / scale
            if words is None:
                q = round(float(level))  # half to even
            else:
                u = (np.float32(words[start + place]) + np.float32(0.5)) * np.float32(2**-16)
                q = math.floor(np.float32(level + u))
            found.append(np.float32(q) * scale)
    return np.array(found, np.float32)


@pytest.mark.parametrize(
    ("stage", "largest"), [("int8", 127), ("int4", 7), ("int3", 3), ("ternary", 1)]
)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_it_is_the_quantiser_written_number_by_number(stage, largest, rounding):
    for kind in ("ordinary", "zeros", "outlier", "subnormal"):
        tensors = {f"x{size}": KINDS[kind](size) for size in SIZES}
        _, _, back = sent(tensors, f"{stage}:{rounding},block=64")
        for name, own in tensors.items():
            words = None
            if rounding == "stochastic":
                raw = rng(name).bit_generator.random_raw(-(-len(own) // 4))
                words = [int(word) >> shift & 0xFFFF for word in raw for shift in (0, 16, 32, 48)]
            expected = by_hand(own.numpy(), largest, 64, words)
            assert back[name].numpy().tobytes() == expected.tobytes()


def test_a_tensor_has_its_own_random_numbers_whatever_lies_beside_it():
    one, other = ordinary(4097), ordinary(65)
    alone = sent({"x": one}, "int4")[2]["x"]
    for beside in (
        {"a": other, "x": one},
        {"x": one, "a": other},
        {"a": other, "b": other, "x": one},
    ):
        assert torch.equal(sent(beside, "int4")[2]["x"], alone)


def test_a_thousand_tensors_have_a_header_of_a_few_hundred_bytes():
    tensors = {f"base.layers.{i}.self_attn.q_proj.lora_A.weight": ordinary(64) for i in range(1000)}
    data, _, _ = sent(tensors, "int4")
    assert int.from_bytes(data[:8], "little") < 512
    assert len(data) < 1000 * 34 + 600


def test_several_codecs_and_none_in_one_payload():
    tensors = {"a": ordinary(64), "n": torch.arange(5), "b": ordinary(65), "c": ordinary(10)}
    ragged = TensorSpec("r", (9, 2), torch.float32, ragged=True)
    plain = Schema((*Schema.of(tensors).tensors, ragged))
    schema = plain.coded(lambda spec: {"a": "int4", "b": "int8"}.get(spec.name, ""))
    assert [spec.codec.partition(":")[0] for spec in schema.tensors] == ["int4", "", "int8", "", ""]
    assert schema.plain == plain and schema.digest != plain.digest
    assert Schema.from_table(schema.to_table()) == schema
    tensors["r"] = torch.ones(3, 2)
    back = decode(encode(Payload(tensors), schema, rng), schema).tensors
    assert list(back) == list(tensors)
    assert all(torch.equal(back[name], tensors[name]) for name in ("n", "c", "r"))
    with pytest.raises(MessageError, match="another schema"):
        decode(encode(Payload(tensors), schema, rng), plain)
    with pytest.raises(ValueError, match=r"store schema\.plain"):
        StoredTensors("unused", schema)


@pytest.mark.parametrize(
    "codec",
    [
        "int4",
        "int8:block=256",
        "int4:block=64,stochastic",
        "foo",
        4,
        "int4\n",
        "zstd|int4",
        "",
        None,
    ],
)
def test_a_table_with_anything_but_a_canonical_codec_is_refused(codec):
    table = Schema.of({"x": ordinary(4)}).to_table()
    table["tensors"][0].append(codec)
    with pytest.raises(MessageError, match="a schema is malformed"):
        Schema.from_table(table)


def test_a_codec_of_what_is_no_float_of_fixed_shape_is_refused():
    for spec in (TensorSpec("x", (4,), torch.int64), TensorSpec("x", (4,), torch.float32, True)):
        table = Schema((spec,)).to_table()
        table["tensors"][0].append("bf16")
        with pytest.raises(MessageError, match="of floats of a fixed shape"):
            Schema.from_table(table)


def test_a_tensor_that_is_too_large_once_decoded_is_refused():
    table = Schema.of({"x": ordinary(4)}).to_table()
    table["tensors"] = [["x", [1 << 39], "float32", False, "random_k:1e-09"]]
    with pytest.raises(MessageError, match="bytes, 1099511627776 are allowed"):
        Schema.from_table(table)


def test_more_codecs_than_a_header_holds_are_refused():
    tensors = {f"x{i}": ordinary(4) for i in range(65)}
    with pytest.raises(ValueError, match="at most 64 codecs, not 65"):
        Schema.of(tensors).coded(lambda spec: f"int4:block={8 + int(spec.name[1:])}")
    schema = Schema.of(dict(list(tensors.items())[:64]))
    coded = schema.coded(lambda spec: f"int4:block={8 + int(spec.name[1:])}")
    back = decode(
        encode(Payload({s.name: tensors[s.name] for s in schema.tensors}), coded, rng), coded
    )
    assert len(back.tensors) == 64
    table = coded.to_table()
    table["tensors"].append(["y", [4], "float32", False, "int3:nearest,block=64"])
    with pytest.raises(MessageError, match="more than 64 codecs"):
        Schema.from_table(table)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_encoded(codec, value):
    own = ordinary(64)
    own[5] = value
    with pytest.raises(MessageError, match="tensor x holds NaN or infinity") as found:
        sent({"x": own}, codec)
    assert found.value.kind == "not_finite"


def test_what_is_too_large_is_not_encoded():
    with pytest.raises(MessageError, match=r"tensor x holds 2e\+36, at most 1.32923e\+36 is coded"):
        sent({"x": torch.tensor([2e36])}, "int4")
    with pytest.raises(MessageError, match="beyond 65504, the largest of fp16: use bf16"):
        sent({"x": torch.tensor([7e4])}, "fp16")
    with pytest.raises(MessageError, match=r"a number becomes 5.31691e\+36"):
        sent({"x": torch.full((8,), 2.0**120)}, "random_k:0.25")


def test_random_numbers_are_asked_for_where_they_are_needed():
    with pytest.raises(MessageError, match="draws random numbers: give its encoder an rng"):
        sent({"x": ordinary(4)}, "int4", None)
    sent({"x": ordinary(4)}, "int4:nearest|zstd", None)
