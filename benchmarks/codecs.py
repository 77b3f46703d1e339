"""Codecs of tensors that are sent: bits of a number against entropy, error, speed; and entropy coders.

    python benchmarks/codecs.py [--out benchmarks/results/codecs.md]

Two kinds of numbers, one core: normal ones, and changes as AdamW makes them in some steps, whose
magnitudes are alike (kurtosis 1.7: a normal number of 0.4 beside -1 or 1, cut off at 2). The first
table is of 54 MB of float32 in 412 tensors, (16, 2048) each, the LoRA of a model of 3 billion
parameters. Its columns:

* bits of a number, with scales, indices and header; times fewer bytes than float32;
* those bits over the entropy of codes and scales, each taken alone (where there are codes);
* the relative squared error of the normal numbers, of the changes, and the least that any code of so many
  bits can have on normal ones, 2^(-2 bits);
* millions of bytes of float32 encoded in a second of CPU, decoded, and both together.

The second table is of entropy coders on the packed codes of normal numbers. ANS is that of
``constriction``, if it is installed.
"""

from __future__ import annotations

import argparse
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
import zstandard

from fedloom.randomness import generator
from fedloom.wire.codecs import pipeline
from fedloom.wire.codecs.blocks import BlockCodec
from fedloom.wire.codecs.digits import per_byte
from fedloom.wire.messages import Payload, decode, encode
from fedloom.wire.schema import Schema

TENSORS, SHAPE = 412, (16, 2048)
TURNS = 4

COLUMNS = [
    "codec",
    "bits",
    "times fewer, normal",
    "times fewer, changes",
    "bits over entropy",
    "error, normal",
    "error, changes",
    "least error of so many bits",
    "encode MB/s",
    "decode MB/s",
    "both",
]

CODECS = [
    "bf16",
    "fp16",
    "bf16|zstd",
    "zstd",
    "int8",
    "int4:nearest|zstd",
    "int4",
    "int4:stochastic,block=256|zstd",
    "nf4|zstd",
    "int3|zstd",
    "ternary:nearest|zstd",
    "small",
    "smallest",
    "top_k:0.1|int4|zstd",
    "random_k:0.25|int4|zstd",
    "low_rank:4|int8|zstd",
]


def normal() -> dict[str, torch.Tensor]:
    """Normal numbers."""
    rng = np.random.default_rng(1)
    return {
        f"layer.{i}": torch.from_numpy(rng.standard_normal(SHAPE, np.float32))
        for i in range(TENSORS)
    }


def changes() -> dict[str, torch.Tensor]:
    """Numbers whose magnitudes are alike."""
    rng, found = np.random.default_rng(2), {}
    for i in range(TENSORS):
        own = rng.standard_normal(SHAPE, np.float32) * 0.4 + rng.choice([-1, 1], SHAPE)
        found[f"layer.{i}"] = torch.from_numpy(np.clip(own, -2, 2).astype(np.float32) * 1e-4)
    return found


def rng_of(name: str) -> np.random.Generator:
    """Return the generator of a tensor."""
    return generator(0, f"codec/{name}")


def entropy(symbols: np.ndarray) -> float:
    """Return the bits of all symbols at their own frequencies."""
    shares = np.bincount(symbols.ravel()) / symbols.size
    shares = shares[shares > 0]
    return float(-symbols.size * (shares * np.log2(shares)).sum())


def codes_of(text: str, tensors: dict[str, torch.Tensor]) -> tuple[np.ndarray, float] | None:
    """Return the packed codes of a quantiser, and the bits of the entropy of its codes and scales."""
    codec = pipeline(text)
    if not isinstance(codec.values, BlockCodec) or codec.reduction is not None:
        return None
    shapes, count = [SHAPE] * len(tensors), len(tensors) * SHAPE[0] * SHAPE[1]
    body = pipeline([str(codec.values)]).encode(list(tensors), list(tensors.values()), rng_of)
    high, low, _ = codec.sections(shapes, torch.float32)
    raw, base = np.frombuffer(body, np.uint8)[:-4], len(codec.values.levels)
    packed, bits = raw[high + low :], entropy(raw[:high]) + entropy(raw[high : high + low])
    digits = [packed // base**place % base for place in range(per_byte(base))]
    return packed, bits + entropy(np.stack(digits, 1).reshape(-1)[:count])


def measured(
    text: str, tensors: dict[str, torch.Tensor], turns: int
) -> tuple[int, float, float, float]:
    """Return a payload's bytes, its relative squared error, and seconds to encode and to decode."""
    schema = Schema.of(tensors).coded(lambda spec: text)
    encoding = decoding = float("inf")
    for _ in range(turns):
        began = time.process_time()
        data = encode(Payload(tensors), schema, rng_of)
        middle = time.process_time()
        back = decode(data, schema).tensors
        encoding = min(encoding, middle - began)
        decoding = min(decoding, time.process_time() - middle)
    lost = sum(float(((back[name] - own).double() ** 2).sum()) for name, own in tensors.items())
    whole = sum(float((own.double() ** 2).sum()) for own in tensors.values())
    return len(data), lost / whole, encoding, decoding


def row(text: str, numbers: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> str:
    """Return a codec's row of the first table."""
    count = sum(own.numel() for own in numbers.values())
    size, error, encoding, decoding = measured(text, numbers, TURNS)
    other_size, other_error, _, _ = measured(text, others, 1)
    bits, coded, size_mb = 8 * size / count, codes_of(text, numbers), 4 * count / 1e6
    over = f"{8 * size / coded[1]:.3f}" if coded is not None else ""
    speeds = (size_mb / s for s in (encoding, decoding, encoding + decoding))
    cells = [
        ", ".join(f"`{stage}`" for stage in pipeline(text).stages),
        f"{bits:.2f}",
        f"{32 / bits:.1f}",
        f"{4 * count / other_size:.1f}",
        over,
        f"{error:.2g}" if error < 0.001 else f"{error:.4f}",
        f"{other_error:.2g}" if other_error < 0.001 else f"{other_error:.4f}",
        f"{2 ** (-2 * bits):.2g}",
        *(f"{speed:.0f}" for speed in speeds),
    ]
    return f"| {' | '.join(cells)} |"


def huffman(data: bytes) -> bytes:
    """Code bytes by zlib's Huffman coder alone."""
    own = zlib.compressobj(6, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return own.compress(data) + own.flush()


def coders() -> dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]]:
    """Return functions of coders that encode bytes and decode them."""
    found: dict[str, tuple[Callable[[bytes], bytes], Callable[[bytes], bytes]]] = {
        f"zstd, level {level}": (
            zstandard.ZstdCompressor(level=level).compress,
            zstandard.ZstdDecompressor().decompress,
        )
        for level in (1, 3, 9)
    }
    found["zlib, level 6"] = (zlib.compress, zlib.decompress)
    found["zlib, Huffman only"] = (huffman, lambda data: zlib.decompress(data, -15))
    return found


def ans(symbols: np.ndarray) -> tuple[int, float, float]:
    """Return the bytes of symbols by ANS with their histogram as model, and seconds of both ways."""
    import constriction

    shares = np.bincount(symbols).astype(np.float64) / len(symbols)
    model = constriction.stream.model.Categorical(shares, perfect=False)
    began = time.process_time()
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(symbols.astype(np.int32), model)
    size, middle = coder.get_compressed().nbytes, time.process_time()
    assert np.array_equal(coder.decode(model, len(symbols)), symbols)
    return size, middle - began, time.process_time() - middle


def coder_rows(text: str, numbers: dict[str, torch.Tensor]) -> list[str]:
    """Return the rows of the second table of one quantiser."""
    found = codes_of(text, numbers)
    codec = pipeline(text).values
    assert found is not None and isinstance(codec, BlockCodec)
    packed, base = found[0], len(codec.levels)
    count = sum(own.numel() for own in numbers.values())
    digits = np.stack([packed // base**i % base for i in range(per_byte(base))], 1).reshape(-1)
    least, rows = entropy(digits[:count]), []

    def add(name: str, size: int, encoding: float, decoding: float) -> None:
        bits, speeds = 8 * size, (4 * count / 1e6 / s for s in (encoding, decoding))
        rows.append(
            f"| `{codec.name}` | {name} | {bits / count:.3f} | {bits / least:.3f} | "
            + " | ".join(f"{speed:.0f}" for speed in speeds)
            + " |"
        )

    for name, (coding, reading) in coders().items():
        began = time.process_time()
        coded = coding(packed.tobytes())
        middle = time.process_time()
        assert reading(coded) == packed.tobytes()
        add(name, len(coded), middle - began, time.process_time() - middle)
    try:
        add("ANS of constriction", *ans(digits[:count]))
    except ModuleNotFoundError:
        print("constriction is not installed: no row of ANS")
    return rows


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    numbers, others = normal(), changes()
    used = [f"numpy {np.__version__}", f"zstandard {zstandard.__version__}"]
    with suppress(PackageNotFoundError):
        used.append(f"constriction {version('constriction')}")
    lines = [
        "# Codecs",
        "",
        f"{', '.join(used)}; one core. What each column is: the docstring of `benchmarks/codecs.py`.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|" + " --- |" * len(COLUMNS),
    ]
    for text in CODECS:
        lines.append(row(text, numbers, others))
        print(lines[-1], flush=True)
    lines += [
        "",
        "| codes of | coder | bits | over entropy | encode MB/s | decode MB/s |",
        "|" + " --- |" * 6,
    ]
    for text in ("int8", "int4", "ternary"):
        lines += coder_rows(text, numbers)
    print("\n".join(lines))
    if given.out is not None:
        given.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
