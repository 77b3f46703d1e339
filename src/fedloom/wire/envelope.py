"""What surrounds a payload between machines: who sends it to whom in which exchange, and a signature.

A header is JSON of a fixed form, read before the payload is touched. It holds the payload's SHA-256, so
the signature over the header (``security/keys.py``) covers run, round, client and content. Packed, an
envelope is one run of bytes::

    fedloom1 | length of header | length of signature | header | signature | payload
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, ValidationError

from fedloom.errors import MessageError, OffenceKind
from fedloom.settings.schema import Settings

PROTOCOL = 3
"""Of all that travels between machines; raised when older clients could not take part."""

MAGIC = b"fedloom1"
PREFIX = struct.Struct("<8sIH")
MAX_HEADER = 16 << 20
"""Bytes of the longest header: a schema of a hundred thousand tensors."""

LONGEST_HEADER = PREFIX.size + MAX_HEADER + (1 << 16)
"""Bytes of all that may stand before a payload, signature included."""

MAX_REPLY_HEADER = 64 << 10
"""Bytes of the longest header that a client may send: it has no schema in it."""

LONGEST = 4000
"""Characters of what is said of an error."""


LACKS_START = "it has not been sent yet what the run starts from"
"""What a client says that must be sent it before it can be ready."""


def printable(text: str) -> str:
    """Return a stranger's words without what moves a terminal's cursor, and not at any length."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text[:LONGEST])


Count = Annotated[int, Field(ge=0, le=1 << 62)]

Tally = Annotated[int, Field(ge=0, le=1 << 50)]
"""What a client counts in one phase of an exchange: rows, tokens, steps; bytes of memory. A thousand
machines that train on a million tokens a second take twelve days for that many tokens."""

FLOPS, SECONDS = 1e24, 1e8
"""Most floating-point operations, and seconds, of one phase of an exchange: a thousand accelerators of
1e15 operations a second for twelve days, and three years."""

PHASES = 16
"""Most phases that a client may speak of in one answer."""

SchemaTable = dict[str, Any]


class RequestHeader(Settings):
    """Of what a server sends to a client."""

    kind: Literal["join", "exchange", "end"]
    """What is asked: to get ready, to carry out an action, to write own models and let go."""
    run: str = Field(pattern="^[0-9a-f]{32}$")
    """Tells the run from all others, and names a folder of the client's."""
    began: list[int]
    """For each time that the run began or was resumed, the last round finished before."""
    client: Count
    """Its number in the run."""
    round: Count = 0
    number: Count = 0
    """Of the message, since the run began or was resumed: the same number is the same message."""
    action: str = Field(default="", max_length=64)
    request: SchemaTable | None = None
    reply: SchemaTable | None = None
    experiment: str | None = None
    """TOML; left out where the client has it already."""
    classes: list[str] = []
    streams: bool = False
    """Whether a stream for further messages of the run may be opened at the gateway."""
    certificate: str | None = None
    """PEM of the server's certificate, which the client checks with its authority's."""
    undone: list[Annotated[list[Count], Field(min_length=2, max_length=2)]] = []
    """Earlier messages to this client whose answers did not count, by how many times the run had begun or
    been resumed and by their number: nor does what it kept over them."""
    held: Count = 0
    """Bytes of the answer that are there already, from a stream that broke: the rest is asked for."""
    payload: str = ""
    """SHA-256 of the payload."""


class WorkDone(Settings):
    """What one phase of an exchange cost a client; see ``accounting/ledger.py``."""

    phase: str = Field(max_length=32)
    flops: float = Field(ge=0, le=FLOPS)
    seconds: float = Field(ge=0, le=SECONDS)
    peak_memory: Tally
    tokens: Tally
    targets: Tally
    examples: Tally
    steps: Tally


class Joined(Settings):
    """What a client that is ready says of itself; counts alone."""

    rows: int = Field(ge=1, le=1 << 40)
    """It trains on."""
    held_out: int = Field(ge=0, le=1 << 40)
    """It is judged by."""
    model: Annotated[str, Field(max_length=64), AfterValidator(printable)]
    """SHA-256 of its backbone and tokenizer."""
    version: Annotated[str, Field(max_length=32), AfterValidator(printable)]
    """Of fedloom."""
    protocol: Count = 1
    """What both sides must speak alike."""


class ReplyHeader(Settings):
    """Of what a client sends back."""

    run: str = Field(max_length=64)
    began: Count
    """How many times the run had begun or been resumed when it was asked."""
    client: Count
    round: Count
    number: Count
    error: Annotated[str, Field(max_length=LONGEST), AfterValidator(printable)] | None = None
    """Why there is no payload."""
    work: list[WorkDone] = Field(default=[], max_length=PHASES)
    joined: Joined | None = None
    payload: str = ""


HeaderT = TypeVar("HeaderT", RequestHeader, ReplyHeader)

KIND_OF: dict[str, OffenceKind] = {
    "finite_number": "not_finite",
    "greater_than_equal": "out_of_range",
    "less_than_equal": "out_of_range",
    "string_too_long": "oversized",
    "too_long": "oversized",
}
"""What pydantic calls the mistakes in a header that are not of its form."""


@dataclass(frozen=True)
class Envelope:
    """A header, what it speaks of, and who vouches for it.

    Attributes:
        header: JSON, exactly as it was signed.
        payload: An encoded payload; see ``messages.py``.
        signature: Over the header; empty where the connection itself says who sends.
    """

    header: bytes
    payload: bytes
    signature: bytes = b""

    def pack(self) -> bytes:
        """Return it as one run of bytes."""
        return b"".join(self.parts())

    def parts(self) -> tuple[bytes, bytes]:
        """Return what is packed in two parts, the second being the payload itself, not a copy."""
        prefix = PREFIX.pack(MAGIC, len(self.header), len(self.signature))
        return b"".join([prefix, self.header, self.signature]), self.payload

    @classmethod
    def unpack(cls, data: bytes) -> Envelope:
        """Return the envelope that was packed as ``data``.

        Raises:
            MessageError: It is none.
        """
        if len(data) < PREFIX.size:
            raise MessageError(f"envelope has {len(data)} bytes, too few to be one")
        magic, header, signature = PREFIX.unpack_from(data)
        start = PREFIX.size + header
        if magic != MAGIC or header > MAX_HEADER or start + signature > len(data):
            raise MessageError("envelope is damaged, or of another version of fedloom")
        return cls(
            data[PREFIX.size : start],
            data[start + signature :],
            data[start : start + signature],
        )

    def read(self, form: type[HeaderT], *, longest: int = MAX_HEADER) -> HeaderT:
        """Return the header, checked; and check that the payload is the one it speaks of.

        Raises:
            MessageError: The header is too long, not of that form, or of another payload.
        """
        if len(self.header) > longest:
            raise MessageError(
                f"header has {len(self.header)} bytes, {longest} are allowed", "oversized"
            )
        try:
            header = form.model_validate(json.loads(self.header))
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            where = printable(".".join(map(str, first["loc"]))[:64])
            raise MessageError(
                f"header is not of the form it must have: {where}: {first['msg']}",
                KIND_OF.get(first["type"], "malformed"),
            ) from None
        except (ValueError, RecursionError) as error:
            raise MessageError(f"header is not of the form it must have: {error}") from None
        if header.payload != _digest(self.payload):
            raise MessageError("payload is not the one that its header speaks of", "forged")
        return header


def seal(
    header: HeaderT, payload: bytes = b"", sign: Callable[[bytes], bytes] | None = None
) -> Envelope:
    """Return an envelope, signed if there is something to sign with.

    Args:
        header: What is said of the payload; its SHA-256 is added where it is not there yet.
        payload: An encoded payload.
        sign: Returns the signature of a header.
    """
    full = header if header.payload else header.model_copy(update={"payload": _digest(payload)})
    text = full.model_dump_json(exclude_defaults=True).encode()
    return Envelope(text, payload, sign(text) if sign else b"")


def _digest(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest() if payload else ""
