"""Secure aggregation of an exchange: its stages on the server, and a client's part in each.

The stage of masks in the pipeline of an exchange (``privacy/secure_aggregation/`` is the protocol). An
exchange becomes five: keys, shares, the exchange itself with masked answers, signatures over who
answered, and the shares that take the masks off. Each is carried, checked and counted as any other. The
server gets one sum: of weights, of what clients report, and of their tensors as changes of those that
they were sent. It follows from who answered alone, as integers are summed and masks cancel.

What a server cannot check any more a client does: names, shapes, finite numbers, and the bound of each.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field, replace

import numpy as np
import torch

from fedloom.errors import MessageError, PluginError, RoundFailed, SumRefused
from fedloom.federation.noisy_sums import (
    grid_of,
    is_possible,
    noisy_means,
    noisy_words,
    shares_of,
    width_of,
)
from fedloom.federation.protocol import Total
from fedloom.privacy.distributed_mean import DistributedMean
from fedloom.privacy.distributed_noise import least_survivors
from fedloom.privacy.noise import NoiseSource
from fedloom.privacy.secure_aggregation import primitives
from fedloom.privacy.secure_aggregation import protocol_messages as messages
from fedloom.privacy.secure_aggregation.client import ClientSession
from fedloom.privacy.secure_aggregation.graph import LEAST
from fedloom.privacy.secure_aggregation.masks import Words, packed, packed_bytes, unpacked
from fedloom.privacy.secure_aggregation.primitives import Context
from fedloom.privacy.secure_aggregation.server import ServerSession
from fedloom.privacy.settings import PrivacySettings
from fedloom.randomness import generator
from fedloom.tensors import Tensors
from fedloom.wire.messages import (
    Exchange,
    Masking,
    Payload,
    decode,
    encode,
    fitting_tensors,
    metrics_in_range,
)
from fedloom.wire.schema import Schema, TensorSpec

PREFIX = "secure_aggregation_"

KEYS, SHARES, SIGNATURES, REVEALED = (
    f"{PREFIX}{name}" for name in ("keys", "shares", "signatures", "revealed")
)
"""Actions of the stages beside the exchange itself."""

PROTOCOL = frozenset({KEYS, SHARES, SIGNATURES, REVEALED})

MESSAGE, MASKED = "message", "masked"
"""The one tensor of a protocol message, and that of a masked answer."""

EXAMPLES = "examples"
"""The number of an answer that is its weight."""

ALL_ALIKE = ("",)
"""What the names of tensors begin with, where the mean of all is over clients alike."""

SEEDED = "noise of clients"
"""Names the run in the derivation of noise from a seed."""

Stages = Generator[Exchange, Mapping[int, str], Total]
"""Yields exchanges, is sent who is left out of each and why, and returns the sum."""


def session_of(run: str, segment: int) -> str:
    """Return what keys and signatures are bound to of a run: a run that is resumed has others.

    Args:
        run: Its id.
        segment: How many times it has been started or resumed.
    """
    return f"{run} {segment}"


def elements_of(masking: Masking) -> int:
    """Return the integers of a masked answer: weight, reports, and the tensors' elements."""
    contents, reports = masking.contents, 1 + len(masking.contents.metrics)
    tensors = sum(spec.elements for spec in contents.tensors)
    if masking.noise is not None:
        return 1 + tensors
    return 1 + reports * (1 + grid_of(masking).digits) + tensors


def digest_of(exchange: Exchange, masking: Masking, request: bytes) -> bytes:
    """Return the SHA-256 of a request and of how its answers are masked, which the masks depend on."""
    facts = (
        (exchange.action, exchange.round, masking.run, masking.number),
        (masking.bits, masking.bound, masking.clients, masking.rows, masking.stochastic),
        (masking.contents.digest, exchange.alike, exchange.replies_are_changes),
        *([] if masking.noise is None else [astuple(masking.noise)]),
    )
    whole = hashlib.sha256(json.dumps(facts).encode())
    whole.update(request)
    return whole.digest()


def is_alike(exchange: Exchange, name: str) -> bool:
    """Return whether the mean of a tensor is over clients alike."""
    return any(name.startswith(opening) for opening in exchange.alike)


def _origins(exchange: Exchange, request: bytes) -> Tensors:
    """Return the tensors that were sent and that those of answers are taken as changes of."""
    if exchange.replies_are_changes:
        return {}
    return decode(request, exchange.request_schema).tensors


def _message_schema(longest: int) -> Schema:
    return Schema((TensorSpec(MESSAGE, (longest,), torch.uint8, ragged=True),))


def _payload(name: str, data: bytes | np.ndarray[tuple[int], np.dtype[np.uint8]]) -> Payload:
    array = np.frombuffer(data, np.uint8).copy() if isinstance(data, bytes) else data
    return Payload({name: torch.from_numpy(array)})


def _message(payload: Payload) -> bytes:
    return payload.tensors[MESSAGE].numpy().tobytes()


@dataclass(frozen=True)
class ClientKeys:
    """What a client has for secure aggregation beside what the server sends.

    Attributes:
        identity: Its private Ed25519 key.
        registry: The public ones of all clients.
        secret: 32 random bytes for this sum, of which its keys are made.
    """

    identity: bytes
    registry: Mapping[int, bytes]
    secret: bytes


@dataclass
class SecureClients:
    """The clients of this process in secure aggregation, each with a session that no other sees.

    Attributes:
        identities: Their private Ed25519 keys.
        seed: The experiment's, from which the rounding is drawn.
        registry: The public ones of all clients; of these alone, where it is empty.
        given: Keys of clients whose work another process has handed on.
        seeded: Whether noise that clients add is drawn from the seed, too: reproducible, not private.
    """

    identities: Mapping[int, bytes]
    seed: int
    registry: dict[int, bytes] = field(default_factory=dict)
    given: dict[int, ClientKeys] = field(default_factory=dict)
    seeded: bool = False
    _context: Context | None = None
    _secrets: dict[int, bytes] = field(default_factory=dict)
    _sessions: dict[int, ClientSession] = field(default_factory=dict)
    _ended: dict[int, tuple[int, int]] = field(default_factory=dict)

    @classmethod
    def fresh(cls, clients: Collection[int], seed: int, *, seeded: bool = False) -> SecureClients:
        """Return clients with identities from the operating system's randomness."""
        primitives.require_cryptography()
        identities = {client: os.urandom(primitives.KEY_BYTES) for client in clients}
        return cls(identities, seed, seeded=seeded)

    def keys_of(self, exchange: Exchange, client: int) -> ClientKeys:
        """Return a client's keys for an exchange; its secret is drawn when it is first asked."""
        if client in self.given:
            return self.given[client]
        self._enter(exchange)
        if client not in self._secrets:
            self._secrets[client] = os.urandom(primitives.KEY_BYTES)
        return ClientKeys(self.identities[client], self.public_keys(), self._secrets[client])

    def public_keys(self) -> Mapping[int, bytes]:
        """Return the registry."""
        if not self.registry:
            self.registry = {own: primitives.identity_of(k) for own, k in self.identities.items()}
        return self.registry

    def under_way(self, client: int) -> bool:
        """Return whether a client is between two stages of a sum."""
        return client in self._sessions

    def answer(self, exchange: Exchange, client: int) -> bytes:
        """Return a client's answer to a stage that is no work on its rows.

        Raises:
            SumRefused: The client refuses.
            MessageError: The request does not fit its schema.
        """
        received = _message(decode(exchange.requests[client], exchange.request_schema))
        with _refusing():
            if exchange.action == KEYS:
                found = self._begun(exchange, client).advertise()
            else:
                session = self._session(exchange, client)
                stage = {
                    SHARES: session.share,
                    SIGNATURES: session.confirm,
                    REVEALED: session.reveal,
                }[exchange.action]
                found = stage(received)
        if exchange.action == REVEALED:
            del self._sessions[client]
            self._ended[client] = (exchange.round, _masking(exchange).number)
        return encode(_payload(MESSAGE, found), exchange.reply_schema)

    def masked(self, exchange: Exchange, client: int, reply: Payload) -> bytes:
        """Return a client's masked answer.

        Raises:
            SumRefused: The client refuses.
            MessageError: The answer does not fit its schema, or is not finite.
        """
        masking = _masking(exchange)
        with _refusing():
            session = self._session(exchange, client)
            _require_as_begun(session, masking)
        request = exchange.requests[client]
        words = self._words(exchange, session, reply)
        digest = digest_of(exchange, masking, request)
        with _refusing():
            session.mask(masking.messages.get(client, b""), digest, words)
        width = width_of(masking)
        words &= np.uint32(2**width - 1)
        return encode(_payload(MASKED, packed(words, width)), exchange.reply_schema)

    def _words(self, exchange: Exchange, session: ClientSession, reply: Payload) -> Words:
        """Return an answer as integers."""
        masking, client = _masking(exchange), session.client
        tensors = fitting_tensors(reply, masking.contents)
        rng = None
        if masking.stochastic:
            purpose = f"rounding of masked answers {masking.number}"
            rng = generator(self.seed, purpose, client, exchange.round)
        shares = shares_of(masking)
        if shares is not None:
            origins = _origins(exchange, exchange.requests[client])
            moment = exchange.round, masking.number, client
            return noisy_words(shares, tensors, origins, rng, self._noise(session), moment)
        return self._plain_words(exchange, client, reply, tensors, rng)

    def _noise(self, session: ClientSession) -> NoiseSource:
        """Return where a client's noise in one sum comes from: its secret of this sum, or the seed."""
        if self.seeded:
            return NoiseSource.seeded(self.seed, SEEDED)
        return NoiseSource(session.noise_key, session.context.run)

    @staticmethod
    def _plain_words(
        exchange: Exchange,
        client: int,
        reply: Payload,
        tensors: Tensors,
        rng: np.random.Generator | None,
    ) -> Words:
        """Return an answer as integers without noise, with its weight and what the client reports."""
        masking = _masking(exchange)
        grid, contents = grid_of(masking), masking.contents
        weight = grid.weight(reply.numbers.get(EXAMPLES, 1.0))
        words = np.zeros(elements_of(masking), dtype=np.uint32)
        sizes = sum(spec.elements for spec in contents.tensors)
        place, cut = len(words) - sizes, 0
        origins = _origins(exchange, exchange.requests[client])
        for name, tensor in tensors.items():
            values = tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)
            if name in origins:
                values = values - origins[name].to(values.dtype)
            own = 1 if is_alike(exchange, name) else weight
            out = words[place : place + values.numel()]
            try:
                cut += grid.put(values.reshape(-1).numpy(), own, out, rng)
            except MessageError as error:
                raise MessageError(f"tensor {name} {error}", error.kind) from None
            place += values.numel()
        metrics = metrics_in_range(reply, contents)
        reports = [cut / max(1, sizes), *(metrics.get(spec.name) for spec in contents.metrics)]
        head = [weight] + [own for value in reports for own in grid.put_number(value, weight)]
        words[: len(head)] = head
        return words

    def _enter(self, exchange: Exchange) -> Context:
        """Forget the sessions of earlier sums."""
        masking = _masking(exchange)
        context = Context(masking.run, exchange.round, masking.number)
        if self._context is None or context.run != self._context.run:
            self._ended = {}
        if context != self._context:
            self._context, self._secrets, self._sessions = context, {}, {}
        return context

    def _begun(self, exchange: Exchange, client: int) -> ClientSession:
        context = self._enter(exchange)
        if client in self._sessions:
            raise MessageError("a server asks for new keys in the middle of a sum", "replayed")
        if (context.round, context.number) <= self._ended.get(client, (0, -1)):
            raise MessageError(
                "a server asks for a sum again that this client has ended", "replayed"
            )
        keys, masking = self.keys_of(exchange, client), _masking(exchange)
        least = LEAST if masking.noise is None else least_survivors(masking.clients)
        own = ClientSession(context, client, keys.identity, keys.registry, keys.secret, least)
        self._sessions[client] = own
        return own

    def _session(self, exchange: Exchange, client: int) -> ClientSession:
        self._enter(exchange)
        if client not in self._sessions:
            raise MessageError("this client takes part in no sum of this run and round", "replayed")
        return self._sessions[client]


def _require_as_begun(session: ClientSession, masking: Masking) -> None:
    """Check that a client's share of the noise is reckoned for no more clients than it insists on.

    Raises:
        MessageError: Others are named now than when the sum began.
    """
    if masking.noise is not None and session.least != least_survivors(masking.clients):
        raise MessageError(
            f"a sum of {masking.clients} clients, where {session.least} at least were to be left when it "
            "began: its noise would be another's",
            "forged",
        )


@contextmanager
def _refusing() -> Iterator[None]:
    """Have what a client's session refuses be told from other errors."""
    try:
        yield
    except MessageError as error:
        raise SumRefused(str(error), error.kind) from None


def _masking(exchange: Exchange) -> Masking:
    if exchange.masking is None:
        raise MessageError(f"{exchange.action!r} says nothing of how answers are masked")
    return exchange.masking


@dataclass(frozen=True)
class SecureAggregation:
    """The server of secure aggregation in the loop of rounds.

    Attributes:
        run: Id of the run, and which time it has been started or resumed (:func:`session_of`).
        bits: Of a value.
        bound: Largest absolute value.
        stochastic: Whether values are rounded at random.
        private: What accounts for the noise that clients add, where they add some.
    """

    run: str
    bits: int
    bound: float
    stochastic: bool
    private: DistributedMean | None = None

    @classmethod
    def of(
        cls,
        privacy: PrivacySettings,
        run: str | None,
        segment: int = 0,
        private: DistributedMean | None = None,
    ) -> SecureAggregation | None:
        """Return that of a run, ``None`` where the server may see single updates.

        Args:
            privacy: Settings.
            run: Id of the run.
            segment: How many times it has been started or resumed, where clients keep it in memory.
            private: What accounts for the noise that clients add.
        """
        if not privacy.secure_aggregation:
            return None
        stochastic, bound = privacy.sum_rounding == "stochastic", privacy.sum_bound
        session = session_of(run or "", segment)
        return cls(session, privacy.sum_bits, bound, stochastic, private)

    def stages(
        self,
        exchange: Exchange,
        number: int,
        rows: Mapping[int, int],
        largest: int | None,
        registry: Mapping[int, bytes],
    ) -> Stages:
        """Yield the stages of an exchange; return what its answers sum to.

        Args:
            exchange: As the method asked.
            number: Which of the round's sums it is, from 0.
            rows: Registered rows of each client.
            largest: The most rows that count, if not all do.
            registry: Public keys with which clients sign.

        Raises:
            RoundFailed: Too few clients are left, or what they sent does not fit together.
            PluginError: The exchange has no answers that could be summed.
        """
        _require_summable(exchange)
        clients = tuple(exchange.requests)
        if len(clients) < LEAST:
            raise RoundFailed(
                f"round {exchange.round}: secure aggregation needs {LEAST} clients at least, and "
                f"{len(clients)} can be asked"
            )
        masking = self._masking_of(exchange, number, [rows[client] for client in clients], largest)
        _require_room(exchange, masking)
        context = Context(self.run, exchange.round, number)
        fewest = least_survivors(len(clients))  # of those asked: of fewer, nothing is revealed
        session = ServerSession(context, elements_of(masking), registry, least=fewest)
        plain = replace(exchange, masking=masking)
        left = yield _stage(plain, KEYS, dict.fromkeys(clients, b""), session.take_keys)
        keys = session.keys()
        there = [client for client in clients if client not in left]
        yield _stage(plain, SHARES, dict.fromkeys(there, keys), session.take_shares)
        yield _answers(plain, session.shares(), session)
        if (kept := self._kept(plain)) is not None:
            return kept  # the masks of this time stay on
        survivors = session.survivors
        listed = dict.fromkeys(survivors, session.survivors_list())
        left = yield _stage(plain, SIGNATURES, listed, session.take_signature)
        signed = [client for client in survivors if client not in left]
        signatures = dict.fromkeys(signed, session.signatures())
        self._spend(plain, survivors)
        yield _stage(plain, REVEALED, signatures, session.take_revealed)
        digest = digest_of(exchange, masking, next(iter(exchange.requests.values())))
        words = session.unmasked(digest)
        words &= np.uint32(2 ** width_of(masking) - 1)
        if self.private is not None:
            return self._released(self.private, plain, survivors, words)
        return _total(plain, survivors, words)

    def _kept(self, exchange: Exchange) -> Total | None:
        """Return what a sum of this work said before a kill, if it is accounted for and on the disk."""
        if self.private is None or not _masking(exchange).contents.tensors:
            return None
        found = self.private.kept(exchange.round, _work_of(exchange))
        if found is None:
            return None
        means, clients = found
        self.private.take(exchange.round, clients)
        ordered = {spec.name: means[spec.name] for spec in _masking(exchange).contents.tensors}
        return Total(clients, ordered, ALL_ALIKE, {}, 0.0)

    def _spend(self, exchange: Exchange, survivors: tuple[int, ...]) -> None:
        """Account for a sum before the masks are taken off.

        Raises:
            PrivacyError: The budget would be passed.
        """
        shares = shares_of(_masking(exchange))
        if self.private is None or shares is None or not shares.numbers:
            return  # that somebody is there is no release
        self.private.take(exchange.round, survivors)
        part = self.private.part  # asked again in another, it has other noise
        named = hashlib.sha256(_work_of(exchange) + part + repr(survivors).encode()).digest()
        self.private.spend(exchange.round, named, shares, survivors)

    @staticmethod
    def _released(
        private: DistributedMean, exchange: Exchange, survivors: tuple[int, ...], words: Words
    ) -> Total:
        """Return what a sum with noise says, once it is on the disk.

        Raises:
            RoundFailed: No answers of the clients could have this sum.
            OutputError: It cannot be written.
        """
        masking = _masking(exchange)
        shares = shares_of(masking)
        assert shares is not None, "noise is accounted for where clients add some"
        if not is_possible(shares, len(survivors), words):
            raise _impossible(exchange)
        origins = _origins(exchange, next(iter(exchange.requests.values())))
        expected = private.plan.expected
        means = noisy_means(shares, words, masking.contents, origins, expected)
        if means:
            private.keep(exchange.round, _work_of(exchange), means, survivors)
        return Total(survivors, means, ALL_ALIKE, {}, 0.0)

    def _masking_of(
        self, exchange: Exchange, number: int, rows: list[int], largest: int | None
    ) -> Masking:
        weighed = EXAMPLES in {spec.name for spec in exchange.reply_schema.numbers}
        weighed = weighed and self.private is None
        most = max(rows) if weighed else 1
        return Masking(
            self.run,
            number,
            self.bits,
            self.bound,
            len(rows),
            most if largest is None else min(most, largest),
            self.stochastic,
            exchange.reply_schema,
            noise=None if self.private is None else self.private.noise,
        )


def _require_room(exchange: Exchange, masking: Masking) -> None:
    """Check that what clients are to add fits, and that some of them are relied on.

    Raises:
        RoundFailed: It does not, as fewer clients are there than the run was planned for.
    """
    shares = shares_of(masking)
    if shares is None:
        return
    try:
        shares.width  # noqa: B018 (it checks)
    except ValueError as error:
        raise RoundFailed(f"round {exchange.round}: {error}") from None


def _work_of(exchange: Exchange) -> bytes:
    """Return what names the work of a sum, in whichever part of the run it is asked for."""
    request = next(iter(exchange.requests.values()))
    return digest_of(exchange, replace(_masking(exchange), run=""), request)


def _require_summable(exchange: Exchange) -> None:
    """Check that the answers to an exchange can be summed.

    Raises:
        PluginError: They cannot.
    """
    schema, why = exchange.reply_schema, ""
    if any(spec.ragged or not spec.dtype.is_floating_point for spec in schema.tensors):
        why = "its replies have tensors without a fixed shape, or of whole numbers"
    elif numbers := {spec.name for spec in schema.numbers} - {EXAMPLES}:
        why = f"its replies have the numbers {sorted(numbers)}, of each client alone"
    elif exchange.check is not None:
        why = "it checks each reply by itself"
    elif len(set(exchange.requests.values())) > 1:
        why = "it does not send all clients the same"
    if why:
        raise PluginError(
            f"{exchange.action!r} does not go with privacy.secure_aggregation, which the method's "
            f"declaration says it does: {why}"
        )


def _stage(
    exchange: Exchange,
    action: str,
    requests: Mapping[int, bytes],
    take: Callable[[int, bytes], None],
) -> Exchange:
    """Return the exchange of one stage, whose answers ``take`` checks and keeps."""
    longest = max(map(len, requests.values()))
    request = _message_schema(longest)
    encoded = {data: encode(_payload(MESSAGE, data), request) for data in set(requests.values())}
    entry = messages.ID_BYTES + max(messages.SEALED_BYTES, messages.REVEALED_BYTES)
    return Exchange(
        action,
        exchange.round,
        request,
        _message_schema(max(messages.KEYS_BYTES, entry * _masking(exchange).clients)),
        {client: encoded[data] for client, data in requests.items()},
        lambda client, payload: take(client, _message(payload)),
        masking=exchange.masking,
    )


def _answers(exchange: Exchange, shares: Mapping[int, bytes], session: ServerSession) -> Exchange:
    """Return the exchange itself, with masked answers that go into the session's sum as they come."""
    masking = _masking(exchange)
    count, width = session.elements, width_of(masking)

    def take(client: int, payload: Payload) -> None:
        session.take_masked(client, unpacked(payload.tensors[MASKED].numpy(), count, width))

    return replace(
        exchange,
        reply_schema=Schema((TensorSpec(MASKED, (packed_bytes(count, width),), torch.uint8),)),
        requests={client: exchange.requests[client] for client in shares},
        check=take,
        masking=replace(masking, messages=shares),
    )


def _require_possible(exchange: Exchange, clients: tuple[int, ...], words: Words) -> None:
    """Check that no integer of a sum is larger than its weight allows; those of noise nearly all are.

    Raises:
        RoundFailed: One is.
    """
    masking = _masking(exchange)
    grid, weight, number = grid_of(masking), int(words[0]), len(clients)
    possible = number <= weight <= number * grid.heaviest
    place = len(words) - sum(spec.elements for spec in masking.contents.tensors)
    for spec in masking.contents.tensors:
        own = number if is_alike(exchange, spec.name) else weight
        sums = words[place : place + spec.elements]
        possible = possible and int(sums.max(initial=0)) <= own * 2 * grid.half
        place += spec.elements
    if not possible:
        raise _impossible(exchange)


def _impossible(exchange: Exchange) -> RoundFailed:
    return RoundFailed(
        f"round {exchange.round}: secure aggregation: no updates have this sum: a client was sent "
        "another model or other settings than the others, or sent numbers that it must not; the sum "
        "is not used"
    )


def _total(exchange: Exchange, clients: tuple[int, ...], words: Words) -> Total:
    """Return what a sum of answers says.

    Raises:
        RoundFailed: No answers of the clients could have this sum.
    """
    masking = _masking(exchange)
    grid, contents = grid_of(masking), masking.contents
    weight, place = int(words[0]), 1
    _require_possible(exchange, clients, words)
    reports = []
    for _ in range(1 + len(contents.metrics)):
        end = place + 1 + grid.digits
        reports.append(grid.mean_number([int(word) for word in words[place:end]]))
        place = end
    origins, means = _origins(exchange, next(iter(exchange.requests.values()))), Tensors()
    for spec in contents.tensors:
        own = len(clients) if is_alike(exchange, spec.name) else weight
        mean = torch.from_numpy(grid.mean(words[place : place + spec.elements], own))
        mean = mean.view(spec.shape)
        if spec.name in origins:
            mean += origins[spec.name]
        means[spec.name] = mean.to(spec.dtype)
        place += spec.elements
    names = [spec.name for spec in contents.metrics]
    metrics = {n: value for n, value in zip(names, reports[1:], strict=True) if value is not None}
    return Total(clients, means, exchange.alike, metrics, reports[0] or 0.0)
