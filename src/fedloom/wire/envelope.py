"""The envelope of a payload between machines: sender, receiver, exchange, and a signature.

A header is JSON of a fixed form, read before the payload is touched. It holds the payload's SHA-256, so
the signature over the header (``security/keys.py``) covers run, round, client and content. Packed, an
envelope is one sequence of bytes::

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

from fedloom.errors import MessageError, ViolationKind
from fedloom.settings.schema import Settings

PROTOCOL = 3
"""Protocol version of messages between machines; raised when older clients could not take part."""

MAGIC = b"fedloom1"
PREFIX = struct.Struct("<8sIH")
MAX_HEADER = 16 << 20
"""Bytes of the longest header: a schema of a hundred thousand tensors."""

LONGEST_HEADER = PREFIX.size + MAX_HEADER + (1 << 16)
"""Largest number of bytes before a payload, signature included."""

MAX_REPLY_HEADER = 64 << 10
"""Bytes of the longest header that a client may send: it holds no schema."""

LONGEST = 4000
"""Longest text of an error, in characters."""


LACKS_START = "it has not been sent yet what the run starts from"
"""Reply of a client that must be sent the start of the run before it can be ready."""


def printable(text: str) -> str:
    """Return untrusted text with only printable characters and of bounded length."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text[:LONGEST])


Count = Annotated[int, Field(ge=0, le=1 << 62)]

Tally = Annotated[int, Field(ge=0, le=1 << 50)]
"""Largest count that a client may report for one phase of an exchange: rows, tokens, steps; bytes of
memory. A thousand machines that train on a million tokens a second take twelve days for that many
tokens."""

FLOPS, SECONDS = 1e24, 1e8
"""Most floating-point operations, and seconds, of one phase of an exchange: a thousand accelerators of
1e15 operations a second for twelve days, and three years."""

PHASES = 16
"""Most phases that a client may report in one answer."""

SchemaTable = dict[str, Any]


Hex = Annotated[str, Field(pattern="^([0-9a-f]{2}){1,128}$")]
"""Bytes of a key or a signature."""


class SigningKey(Settings):
    """A client's Ed25519 key for a run, by which it signs in secure aggregation."""

    public: Hex
    signature: Hex
    """Of the client's own key (``security/signing_keys.py``)."""


class Peer(Settings):
    """A client of a sum, as the others are told of it."""

    client: Count
    """Its number in the run."""
    member: Count
    """Its number as a member of the federation."""
    key: str = Field(max_length=400)
    """Its own public key in a line of OpenSSH."""
    signing: SigningKey


class SumHeader(Settings):
    """How the answer to a request is summed; see :class:`fedloom.wire.messages.Masking`."""

    number: int = Field(ge=0, le=1023)
    """Which of the round's sums it is."""
    bits: int = Field(ge=8, le=24)
    bound: float = Field(gt=0, le=1e300)
    clients: int = Field(ge=1, le=1 << 20)
    rows: int = Field(ge=1, le=1 << 40)
    stochastic: bool
    contents: SchemaTable
    """Schema of the answer before it is masked."""
    alike: list[Annotated[str, Field(max_length=256)]] = Field(default=[], max_length=64)
    changes: bool = False
    """Whether tensors of the answer are changes already."""
    shares: str = Field(default="", max_length=4 << 20)
    """Encrypted shares from the client's neighbours, in base64, beside the request itself."""
    peers: list[Peer] = Field(default=[], max_length=10_000)
    """The clients of the sum, at its first stage."""


class RequestHeader(Settings):
    """Header of a request from the server to a client."""

    kind: Literal["join", "exchange", "end"]
    """Kind of the request: get ready, carry out an action, or write the client's own models and end."""
    run: str = Field(pattern="^[0-9a-f]{32}$")
    """Id of the run; also the name of a folder at the client."""
    began: list[int]
    """For each time that the run began or was resumed, the last round finished before."""
    client: Count
    """Its number in the run."""
    round: Count = 0
    number: Count = 0
    """Number of the message since the run was started or resumed: the same number is the same message."""
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
    """Earlier messages to this client whose answers did not count, by the segment of the run and their
    number: the client discards what it stored with them."""
    held: Count = 0
    """Bytes of the answer that have arrived already over a stream that broke: only the rest is
    requested."""
    summed: SumHeader | None = None
    """How the answer is summed, under secure aggregation."""
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


class PrivateWork(Settings):
    """What a client says of its private steps: what their privacy follows from, and nothing else."""

    units: int = Field(ge=1, le=1 << 40)
    """Rows, or values of privacy.column."""
    noise_multiplier: float = Field(ge=0, le=1e6)
    """z, its noise over the clip."""
    steps: int = Field(ge=0, le=1 << 24)
    """Noisy steps of the whole run at most."""


class Joined(Settings):
    """Report of a client that is ready; it holds counts and hashes alone."""

    rows: int = Field(ge=1, le=1 << 40)
    """Number of training rows."""
    held_out: int = Field(ge=0, le=1 << 40)
    """Number of held-out rows."""
    model: Annotated[str, Field(max_length=64), AfterValidator(printable)]
    """SHA-256 of its backbone and tokenizer."""
    version: Annotated[str, Field(max_length=32), AfterValidator(printable)]
    """Version of fedloom."""
    protocol: Count = 1
    """Protocol version, which must be equal on both sides."""
    plugins: dict[
        Annotated[str, Field(max_length=32), AfterValidator(printable)],
        Annotated[str, Field(max_length=64), AfterValidator(printable)],
    ] = Field(default={}, max_length=8)
    """SHA-256 of the file of each class that is not fedloom's own, by section of the experiment."""
    private: PrivateWork | None = None
    """How its own steps hide its rows, where the experiment asks for that."""
    signing: SigningKey | None = None
    """Its key for secure aggregation, where the experiment asks for that."""


class ReplyHeader(Settings):
    """Header of a client's reply."""

    run: str = Field(max_length=64)
    began: Count
    """Segment of the run in which it was asked (how many times the run had been started or resumed)."""
    client: Count
    round: Count
    number: Count
    error: Annotated[str, Field(max_length=LONGEST), AfterValidator(printable)] | None = None
    """Why there is no payload."""
    work: list[WorkDone] = Field(default=[], max_length=PHASES)
    joined: Joined | None = None
    payload: str = ""


HeaderT = TypeVar("HeaderT", RequestHeader, ReplyHeader)

KIND_OF: dict[str, ViolationKind] = {
    "finite_number": "not_finite",
    "greater_than_equal": "out_of_range",
    "less_than_equal": "out_of_range",
    "string_too_long": "oversized",
    "too_long": "oversized",
}
"""Pydantic's names of mistakes that mean that a header is malformed."""


@dataclass(frozen=True)
class Envelope:
    """A header, the payload it describes, and a signature.

    Attributes:
        header: JSON, exactly as it was signed.
        payload: An encoded payload; see ``messages.py``.
        signature: Over the header; empty where the connection itself proves the sender.
    """

    header: bytes
    payload: bytes
    signature: bytes = b""

    def pack(self) -> bytes:
        """Return it as one sequence of bytes."""
        return b"".join(self.parts())

    def parts(self) -> tuple[bytes, bytes]:
        """Return the packed bytes in two parts; the second is the payload itself, not a copy."""
        prefix = PREFIX.pack(MAGIC, len(self.header), len(self.signature))
        return b"".join([prefix, self.header, self.signature]), self.payload

    @classmethod
    def unpack(cls, data: bytes) -> Envelope:
        """Return the envelope that was packed as ``data``.

        Raises:
            MessageError: It is not an envelope.
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
        """Return the checked header; check that the payload is the one it describes.

        Raises:
            MessageError: The header is too long, malformed, or describes another payload.
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
                f"header is malformed: {where}: {first['msg']}",
                KIND_OF.get(first["type"], "malformed"),
            ) from None
        except (ValueError, RecursionError) as error:
            raise MessageError(f"header is malformed: {error}") from None
        if header.payload != _digest(self.payload):
            raise MessageError("payload does not match the SHA-256 in its header", "forged")
        return header


def seal(
    header: HeaderT, payload: bytes = b"", sign: Callable[[bytes], bytes] | None = None
) -> Envelope:
    """Return an envelope, signed if there is something to sign with.

    Args:
        header: Describes the payload; the payload's SHA-256 is added where it is missing.
        payload: An encoded payload.
        sign: Returns the signature of a header.
    """
    full = header if header.payload else header.model_copy(update={"payload": _digest(payload)})
    text = full.model_dump_json(exclude_defaults=True).encode()
    return Envelope(text, payload, sign(text) if sign else b"")


def _digest(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest() if payload else ""
