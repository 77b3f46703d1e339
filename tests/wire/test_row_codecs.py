"""Rows of numbers on the wire: what comes back, and how large it is."""

import pytest
import torch

from fedloom.accounting.traffic import row_bytes
from fedloom.wire.messages import Payload, decode, encode
from fedloom.wire.row_codecs import pack_rows, row_specs, unpack_rows
from fedloom.wire.schema import Schema

ROWS = (
    torch.randn(7, 33, generator=torch.Generator().manual_seed(0))
    * torch.tensor([1e-3] + [1.0] * 5 + [1e3])[:, None]
)


@pytest.mark.parametrize(
    ("encoding", "error"), [("fp32", 0), ("bf16", 2**-8), ("fp16", 2**-11), ("int8", 1 / 254)]
)
def test_a_row_comes_back_within_its_rounding(encoding, error):
    specs = row_specs("x", 7, 33, encoding)
    data = encode(Payload(pack_rows("x", ROWS, encoding)), Schema(specs))
    back = unpack_rows("x", decode(data, Schema(specs)).tensors, encoding)
    largest = ROWS.abs().amax(-1, keepdim=True)
    assert ((back - ROWS).abs() <= error * largest * 1.001).all()
    assert len(data) - 7 * row_bytes(33, encoding) < 300  # the header and nothing else


def test_zeros_and_single_large_values_survive_int8():
    rows = torch.tensor([[0.0, 0.0], [0.0, -5.0]])
    assert torch.equal(unpack_rows("x", pack_rows("x", rows, "int8"), "int8"), rows)


def test_what_is_not_finite_stays_so_and_is_refused_on_arrival():
    packed = pack_rows("x", torch.tensor([[1.0, float("nan")]]), "int8")
    assert not torch.isfinite(packed["x_scale"]).all()
