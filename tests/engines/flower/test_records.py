"""An envelope as the content of a Flower message: exact, and refused where it is none."""

from pathlib import Path

import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedloom.engines.flower import records
from fedloom.errors import MessageError
from fedloom.wire.envelope import Envelope

ENVELOPE = Envelope(b"header", b"payload", b"signature")


def test_there_and_back():
    assert records.from_records(records.to_records(ENVELOPE)) == ENVELOPE


def changed(**parts):
    content = records.to_records(ENVELOPE)
    content.update(parts)
    return content


ODD = {
    "nothing": RecordDict(),
    "header of another kind": changed(header=MetricRecord({"header": 1.0, "signature": 2.0})),
    "header of text": changed(header=ConfigRecord({"header": "header", "signature": b"s"})),
    "header without signature": changed(header=ConfigRecord({"header": b"header"})),
    "payload of another kind": changed(payload=ConfigRecord({"payload": b"payload"})),
    "payload of another name": changed(
        payload=ArrayRecord({"other": Array(dtype="uint8", shape=(1,), stype="s", data=b"x")})
    ),
}


@pytest.mark.parametrize("optimize", [0, 1])
@pytest.mark.parametrize("odd", ODD)
def test_what_is_no_envelope_is_refused_under_python_o_too(odd, optimize):
    path = Path(records.__file__)
    own = {"__name__": records.__name__}
    exec(compile(path.read_text(), path, "exec", optimize=optimize), own)
    with pytest.raises(MessageError, match="holds no envelope of fedloom"):
        own["from_records"](ODD[odd])
