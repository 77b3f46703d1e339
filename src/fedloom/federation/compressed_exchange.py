"""Compression of an exchange: what is sent in place of tensors, on the server and at a client.

A stage in the pipeline of an exchange, like ``secure_exchange.py``, between a method, which sees tensors
as it always does, and engines, which see bytes. Codecs are in ``wire/codecs/``; here is what they are
applied to, and what each side remembers.

Up, a client sends the coded change D of each tensor that it received (of other tensors, the tensor). The
server adds what it decodes to what the method sent. What a biased codec C loses is returned by error
feedback, at the client, in its store:

- ``classic`` (Seide et al. 2014; Karimireddy et al. 2019, https://arxiv.org/abs/1901.09847): sends
  C(D + e); e becomes D + e - C(D + e). After m rounds without the client, e counts ``absence_decay`` to
  the power of m, and nothing after more than ``absence_limit`` rounds.
- ``ef21`` (Richtarik et al. 2021, https://arxiv.org/abs/2106.05203): both sides keep h of the client, 0
  at first; it sends C(D - h), both add that to h, and h is its change. The method takes the mean over
  those that answered, as it does of any changes; an absent client's h stays.

Down, where all clients are sent the same, the server codes the change from the model h that clients hold
to the method's model, and h moves by what they decode. So all that hold h hold the same bits, and what
the codec loses is part of the next change: it is the server's error feedback. A version counts the moves
of h. A client is sent what moves its version to the present one: several earlier changes at once if it
was away, or h itself where that is less, or where its version is not known as its last answer did not
count. Version 0 is what every party initialises from the seed. A client checks SHA-256 of what it holds.

What a client keeps here is in slots of its store that no method sees, staged with its answer, so that an
answer that does not count moves neither side. What the server keeps is saved with each checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from fedloom.errors import MessageError, PluginError
from fedloom.randomness import generator
from fedloom.storage.checkpoint import CLIENT
from fedloom.tensors import State, Tensors
from fedloom.wire.messages import Exchange, Payload, decode, encode, with_metrics
from fedloom.wire.schema import Schema, TensorSpec, amount
from fedloom.wire.settings import WireSettings

PREFIX = "[wire] "
"""What names begin with of tensors of messages, and of slots of a client's store, that no method sees."""

CONTROL, MISSED, UPDATES = f"{PREFIX}control", f"{PREFIX}missed ", f"{PREFIX}updates"
"""Tensors of messages: what a request says of itself, as JSON; changes that a client has missed, each an
encoded message; and how often a client has moved its h of ``ef21``."""

HELD, RESIDUAL, ESTIMATE = f"{PREFIX}held ", f"{PREFIX}residual ", f"{PREFIX}estimate "
"""Slots of a client's store, each before an action: the model that it holds; e; h of ``ef21``."""

ADAPTER = "adapter/"
"""What names of the adapter begin with in messages of several parts."""

SINCE, COUNT = f"{PREFIX}round", f"{PREFIX}count"
"""Tensors in slots: the round of a residual, and how often h of ``ef21`` was moved."""

CODING_ERROR = amount("coding_error")
"""What a client reports of its codec: squared error of what is read over the square of what it coded."""

UNKNOWN = -1
"""Version of a client of which it is not known what it holds."""

LONGEST_CONTROL = 4096
"""Bytes of what a request says of itself, at most."""


def is_ours(name: str) -> bool:
    """Return whether a tensor or a slot is this layer's, and no method's."""
    return name.startswith(PREFIX)


def is_coded(spec: TensorSpec, settings: WireSettings) -> bool:
    """Return whether a tensor is large enough to be coded, and of a kind that can be."""
    if spec.ragged or not spec.dtype.is_floating_point or len(spec.shape) < 2:
        return False
    return spec.elements * spec.dtype.itemsize >= settings.keep_plain_below


def coded(schema: Schema, codec: object | None, settings: WireSettings) -> Schema:
    """Return a schema of which all tensors are coded that can be, where there is a codec."""
    if codec is None:
        return schema
    return schema.coded(lambda spec: str(codec) if is_coded(spec, settings) else "")


def differences(exchange: Exchange) -> frozenset[str]:
    """Return the tensors of replies that are sent as changes of what was received."""
    if exchange.replies_are_changes:
        return frozenset()
    sent = {spec.name: spec for spec in exchange.request_schema.tensors}
    return _differences(sent, exchange.reply_schema, exchange.changes)


def _differences(
    sent: Mapping[str, TensorSpec], reply: Schema, changes: Iterable[str]
) -> frozenset[str]:
    openings = tuple(changes)
    return frozenset(
        spec.name
        for spec in reply.tensors
        if spec.name in sent
        and spec.shape == sent[spec.name].shape
        and spec.dtype.is_floating_point
        and not spec.ragged
        and not (openings and spec.name.startswith(openings))
    )


def start_of(specs: Iterable[TensorSpec], initial: Tensors) -> Tensors:
    """Return what every party holds before the first round: the adapter as initialised, and zeros."""
    found = {}
    for spec in specs:
        own = initial.get(spec.name, initial.get(spec.name.removeprefix(ADAPTER)))
        if own is None or tuple(own.shape) != spec.shape:
            own = torch.zeros(spec.shape)
        found[spec.name] = own.detach().to("cpu", spec.dtype)
    return found


def moved(held: Tensors, change: Tensors) -> Tensors:
    """Return what is held after a change, computed alike on every machine."""
    return {name: (own.float() + change[name].float()).to(own.dtype) for name, own in held.items()}


def digest(tensors: Tensors) -> str:
    """Return SHA-256 of tensors."""
    return State(tensors).digest()


def _bytes_of(specs: Iterable[TensorSpec]) -> int:
    return sum(spec.elements * spec.dtype.itemsize for spec in specs)


def _blob(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def _blob_spec(name: str, data: bytes) -> TensorSpec:
    return TensorSpec(name, (len(data),), torch.uint8)


@dataclass(frozen=True)
class _Control:
    """What a request says of itself.

    Attributes:
        held: SHA-256 of what the client then holds; empty where nothing is held.
        whole: Whether it is sent whole, and not as changes.
        missed: How many earlier changes come with it.
        changes: As of :class:`fedloom.wire.messages.Exchange`; ``None`` where all of a reply are changes.
        afresh: Whether the client begins ``ef21`` anew.
    """

    held: str = ""
    whole: bool = True
    missed: int = 0
    changes: tuple[str, ...] | None = ()
    afresh: bool = False

    def packed(self) -> bytes:
        return json.dumps(self.__dict__, sort_keys=True).encode()

    @classmethod
    def read(cls, data: bytes) -> _Control:
        """Return what a server says, checked.

        Raises:
            MessageError: It says something else.
        """
        try:
            if len(data) > LONGEST_CONTROL:
                raise ValueError("it is too long")
            found = json.loads(data)
            own = cls(**found)
            changes = own.changes if own.changes is None else tuple(own.changes)
            sound = isinstance(own.held, str) and type(own.missed) is int and own.missed >= 0
            sound = sound and isinstance(own.whole, bool) and isinstance(own.afresh, bool)
            if not sound or not all(isinstance(one, str) for one in changes or ()):
                raise ValueError("a value is of another type")
        except (ValueError, TypeError, RecursionError) as error:
            raise MessageError(f"what a request says of its compression: {error}") from None
        return replace(own, changes=changes)


@dataclass(frozen=True)
class _Held:
    """The model that clients hold for one action.

    Attributes:
        tensors: h.
        version: How often it has moved.
        source: SHA-256 of the method's model that it was last moved towards.
        missed: The last of the moves, each as an encoded message; together no longer than h.
        unheard: Version of a client that has not answered yet.
    """

    tensors: Tensors
    version: int
    source: str = ""
    missed: tuple[bytes, ...] = ()
    unheard: int = 0


@dataclass
class Compression:
    """The server's side in the loop of rounds.

    Attributes:
        settings: ``[wire]``.
        seed: The experiment's, from which rounding is drawn.
        initial: The adapter as it is initialised.
    """

    settings: WireSettings
    seed: int
    initial: Tensors
    _held: dict[str, _Held] = field(default_factory=dict)
    _versions: dict[str, dict[int, int]] = field(default_factory=dict)
    _estimates: dict[str, dict[int, Tensors]] = field(default_factory=dict)
    _updates: dict[str, dict[int, int]] = field(default_factory=dict)
    _afresh: dict[str, set[int]] = field(default_factory=dict)
    _pending: dict[int, tuple[Tensors, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, settings: WireSettings, seed: int, initial: Tensors) -> Compression | None:
        """Return that of a run, ``None`` where tensors are sent as they are."""
        return cls(settings, seed, initial) if settings.compresses else None

    def carried(self, exchange: Exchange) -> Exchange:
        """Return an exchange as it is carried; itself where nothing of it is coded.

        Raises:
            PluginError: It is asynchronous, or masked.
        """
        reply = coded(exchange.reply_schema, self.settings.up_codec, self.settings)
        down = self._coded_down(exchange)
        if not down and reply == exchange.reply_schema:
            return exchange
        if exchange.buffered is not None or exchange.masking is not None:
            raise PluginError(
                f"{exchange.action!r} does not go with [wire], which the method's declaration says it "
                "does: its answers come one by one, or masked"
            )
        if self._has_estimates(reply):
            reply = replace(reply, tensors=(*reply.tensors, TensorSpec(UPDATES, (1,), torch.int64)))
        if any(spec.codec for spec in reply.tensors):
            reply = replace(reply, metrics=(*reply.metrics, CODING_ERROR))
        self._pending = {}
        requests, schemas = self._requests(exchange, down)
        first = next(iter(schemas.values()), exchange.request_schema)
        return replace(
            exchange,
            request_schema=first,
            schemas={c: own for c, own in schemas.items() if own is not first},
            reply_schema=reply,
            requests=requests,
            plain=exchange,
            read=_Reader(self, exchange, reply).read,
        )

    def settle(self, exchange: Exchange, accepted: Collection[int]) -> None:
        """Let what those hold and sent whose answers count be known; of the others it is not known."""
        action = exchange.action
        if exchange.plain is None:
            return
        if action in self._held:
            version, known = self._held[action].version, self._versions.setdefault(action, {})
            known |= {c: version if c in accepted else UNKNOWN for c in exchange.requests}
        for client in self._pending.keys() & set(accepted):
            estimate, updates = self._pending[client]
            self._estimates.setdefault(action, {})[client] = estimate
            self._updates.setdefault(action, {})[client] = updates
            self._afresh.get(action, set()).discard(client)
        self._pending = {}

    def saved(self) -> tuple[dict[str, Any], Tensors]:
        """Return what a checkpoint keeps: facts as plain JSON, and tensors."""
        facts: dict[str, Any] = {}
        tensors: Tensors = {}
        for action, own in self._held.items():
            known = {str(c): version for c, version in self._versions.get(action, {}).items()}
            facts.setdefault("held", {})[action] = {
                "version": own.version,
                "source": own.source,
                "unheard": own.unheard,
                "missed": len(own.missed),
                "clients": known,
                "names": list(own.tensors),
            }
            tensors |= {f"held/{action}/{name}": t for name, t in own.tensors.items()}
            tensors |= {f"missed/{action}/{i}": _blob(one) for i, one in enumerate(own.missed)}
        for action, updates in self._updates.items():
            afresh = sorted(self._afresh.get(action, ()))
            counts = {str(client): count for client, count in updates.items()}
            facts.setdefault("estimates", {})[action] = {"updates": counts, "afresh": afresh}
            for client, estimate in self._estimates[action].items():
                tensors |= {f"{CLIENT}{client:04d}/{action}/{n}": t for n, t in estimate.items()}
        return facts, tensors

    def restore(self, facts: Mapping[str, Any], tensors: Tensors) -> None:
        """Go on from what :meth:`saved` returned."""
        for action, own in facts.get("held", {}).items():
            missed = (tensors[f"missed/{action}/{i}"] for i in range(own["missed"]))
            self._held[action] = _Held(
                {name: tensors[f"held/{action}/{name}"] for name in own["names"]},
                own["version"],
                own["source"],
                tuple(one.numpy().tobytes() for one in missed),
                own["unheard"],
            )
            self._versions[action] = {int(c): version for c, version in own["clients"].items()}
        for action, own in facts.get("estimates", {}).items():
            self._updates[action] = {int(c): count for c, count in own["updates"].items()}
            self._afresh[action] = set(own["afresh"])
            self._estimates[action] = {}
            for client in list(self._updates[action]):
                opening = f"{CLIENT}{client:04d}/{action}/"
                found = {
                    name.removeprefix(opening): tensor
                    for name, tensor in tensors.items()
                    if name.startswith(opening)
                }
                self._estimates[action][client] = found

    def _has_estimates(self, reply: Schema) -> bool:
        return self.settings.error_feedback == "ef21" and any(own.codec for own in reply.tensors)

    def _coded_down(self, exchange: Exchange) -> tuple[TensorSpec, ...]:
        """Return the tensors of a request that are sent as changes.

        These are none where clients are sent different ones, or where nothing of them comes back.
        """
        codec, requests = self.settings.down_codec, exchange.requests.values()
        if codec is None or not requests or len({id(data) for data in requests}) > 1:
            return ()
        returned = {spec.name for spec in exchange.reply_schema.tensors}
        schema = coded(exchange.request_schema, codec, self.settings)
        if not returned & {spec.name for spec in schema.tensors}:
            return ()
        return tuple(spec for spec in schema.tensors if spec.codec)

    def _requests(
        self, exchange: Exchange, down: tuple[TensorSpec, ...]
    ) -> tuple[dict[int, bytes], dict[int, Schema]]:
        """Return each client's request and its schema; equal ones are the same object."""
        held = self._advanced(exchange, down) if down else None
        made: dict[tuple[Any, ...], tuple[bytes, Schema]] = {}
        requests, schemas = {}, {}
        for client, data in exchange.requests.items():
            missing = self._missing(exchange.action, client, held)
            afresh = client in self._afresh.get(exchange.action, ())
            key = (missing, afresh, id(data))
            if key not in made:
                made[key] = self._request(exchange, data, held, missing, down, afresh=afresh)
            requests[client], schemas[client] = made[key]
        return requests, schemas

    def _missing(self, action: str, client: int, held: _Held | None) -> int | None:
        """Return how many moves a client lacks, ``None`` where it is sent the whole."""
        if held is None:
            return None
        version = self._versions.get(action, {}).get(client, held.unheard)
        lacking = held.version - version
        if version == UNKNOWN or lacking > len(held.missed):
            return None
        return lacking

    def _advanced(self, exchange: Exchange, down: tuple[TensorSpec, ...]) -> _Held:
        """Move the model that clients hold towards the method's, unless it was by this very model."""
        action = exchange.action
        sent = exchange.sent_to(next(iter(exchange.requests)))
        wanted = {spec.name: sent[spec.name] for spec in down}
        source, held = digest(wanted), self._held.get(action)
        if held is None:
            held = _Held(start_of(down, self.initial), 0)
        elif {n: t.shape for n, t in held.tensors.items()} != {
            n: t.shape for n, t in wanted.items()
        }:
            self._versions[action] = {}
            held = _Held(wanted, held.version + 1, source, unheard=UNKNOWN)
        if held.source != source:
            change = {
                n: (t.float() - held.tensors[n].float()).to(t.dtype) for n, t in wanted.items()
            }
            schema = Schema(down)
            move = encode(Payload(change), schema, self._rounding(action, held.version))
            missed, most = [*held.missed, move], _bytes_of(down)
            while sum(map(len, missed)) > most and len(missed) > 1:
                del missed[0]
            after = moved(held.tensors, decode(move, schema).tensors)
            held = replace(
                held, tensors=after, version=held.version + 1, source=source, missed=tuple(missed)
            )
        self._held[action] = held
        return held

    def _rounding(self, action: str, version: int) -> Callable[[str], np.random.Generator]:
        return lambda name: generator(self.seed, f"wire down {action} {version} {name}")

    def _request(
        self,
        exchange: Exchange,
        data: bytes,
        held: _Held | None,
        missing: int | None,
        down: tuple[TensorSpec, ...],
        *,
        afresh: bool,
    ) -> tuple[bytes, Schema]:
        """Return a request as it is sent, with its schema.

        In place of a tensor that is sent as changes is one without elements, which says its shape.
        """
        plain, names = decode(data, exchange.request_schema), {spec.name for spec in down}
        tensors, specs = dict(plain.tensors), list(exchange.request_schema.tensors)
        blobs = {}
        if held is not None and missing is None:
            tensors |= held.tensors
        elif held is not None and missing is not None:
            specs = [_placeholder(spec) if spec.name in names else spec for spec in specs]
            tensors |= {
                s.name: torch.empty(s.shape, dtype=s.dtype) for s in map(_placeholder, down)
            }
            moves = held.missed[len(held.missed) - missing :]
            blobs = {f"{MISSED}{i}": move for i, move in enumerate(moves)}
        control = _Control(
            digest(held.tensors) if held is not None else "",
            missing is None,
            missing or 0,
            None if exchange.replies_are_changes else exchange.changes,
            afresh,
        )
        blobs[CONTROL] = control.packed()
        specs += [_blob_spec(name, own) for name, own in blobs.items()]
        tensors |= {name: _blob(own) for name, own in blobs.items()}
        schema = replace(exchange.request_schema, tensors=tuple(specs))
        return encode(Payload(tensors, plain.numbers, plain.metrics), schema), schema

    def estimated(
        self, action: str, client: int, change: Tensors, names: Collection[str], updates: int
    ) -> Tensors:
        """Return a client's change as ``ef21`` estimates it now, once it has moved its h so often.

        Raises:
            MessageError: Server and client have not moved h equally often.
        """
        known = self._updates.get(action, {}).get(client, 0)
        before = self._estimates.get(action, {}).get(client, {})
        if updates == 1:
            before = {}  # it has begun anew, whether it was told to or its store was lost
        elif updates != known + 1:
            self._afresh.setdefault(action, set()).add(client)
            raise MessageError(
                f"it has moved its estimate {updates - 1} times and the server {known} times; it begins "
                "anew in its next round"
            )
        after = {
            n: before[n] + change[n].float() if n in before else change[n].float() for n in names
        }
        self._pending[client] = after, updates
        return {**change, **after}


def _placeholder(spec: TensorSpec) -> TensorSpec:
    return TensorSpec(spec.name, (0, *spec.shape), spec.dtype)


@dataclass
class _Reader:
    """Makes of coded replies to an exchange what its method expects.

    Attributes:
        compression: The server's side.
        exchange: As the method asked.
        schema: Of a reply as it is carried.
    """

    compression: Compression
    exchange: Exchange
    schema: Schema
    _sent: dict[int, Tensors] = field(default_factory=dict)

    def read(self, client: int, data: bytes) -> Payload:
        """Return a reply with the tensors that its schema had before it was coded."""
        payload = decode(data, self.schema)
        change = dict(payload.tensors)
        updates = change.pop(UPDATES, None)
        if updates is not None:
            lossy = [spec.name for spec in self.schema.tensors if spec.codec]
            change = self.compression.estimated(
                self.exchange.action, client, change, lossy, int(updates)
            )
        sent, found = self._sent_to(client), {}
        names = differences(self.exchange)
        for spec in self.exchange.reply_schema.tensors:
            own = change[spec.name]
            if spec.name in names:
                own = (sent[spec.name].float() + own.float()).to(spec.dtype)
            found[spec.name] = own if own.dtype == spec.dtype else own.to(spec.dtype)
        return replace(payload, tensors=found)

    def _sent_to(self, client: int) -> Tensors:
        """Return what the method sent a client; decoded once where several were sent the same."""
        key = id(self.exchange.requests[client])
        if key not in self._sent:
            self._sent[key] = self.exchange.sent_to(client)
        return self._sent[key]


def of_methods(slots: Mapping[str, Tensors]) -> dict[str, Tensors]:
    """Return the slots of a client's store that its method sees."""
    return {name: own for name, own in slots.items() if not is_ours(name)}


@dataclass
class ClientLink:
    """A client's side of one request: what its method sees of it, and what is sent for its reply.

    Attributes:
        exchange: The request.
        client: Whose it is.
        payload: As the method's handler sees it.
    """

    exchange: Exchange
    client: int
    payload: Payload
    _settings: WireSettings
    _seed: int
    _control: _Control | None
    _ours: dict[str, Tensors]
    _made: tuple[Payload, bytes, Payload] | None = None

    @classmethod
    def opened(
        cls,
        exchange: Exchange,
        client: int,
        settings: WireSettings,
        seed: int,
        slots: Mapping[str, Tensors],
        initial: Tensors,
    ) -> ClientLink:
        """Decode a request.

        Args:
            exchange: With the request.
            client: Whose it is.
            settings: ``[wire]`` of this client's experiment.
            seed: The experiment's.
            slots: The client's store.
            initial: Its adapter as it is initialised.

        Raises:
            MessageError: The request is none, or is coded in another way than the experiment says, or
                this client does not hold what it is a change of.
        """
        payload = decode(exchange.requests[client], exchange.schema_of(client))
        ours = {name: own for name, own in slots.items() if is_ours(name)}
        link = cls(exchange, client, payload, settings, seed, None, ours)
        if CONTROL in payload.tensors:
            link._receive(initial)
        if CONTROL not in payload.tensors and any(s.codec for s in exchange.reply_schema.tensors):
            raise MessageError("the server asks for a coded reply and does not say what it is to")
        return link

    def _receive(self, initial: Tensors) -> None:
        """Take what a compressed request says of itself, and the model that it moves to."""
        tensors = dict(self.payload.tensors)
        self._control = control = _Control.read(tensors.pop(CONTROL).numpy().tobytes())
        codec = self._settings.up_codec
        allowed = {"", str(codec)} if codec is not None else {""}
        if others := {spec.codec for spec in self.exchange.reply_schema.tensors} - allowed:
            raise MessageError(
                f"the server asks for a reply in {sorted(others)[0]!r}, and the experiment says "
                f"wire.up = {self._settings.up!r}"
            )
        moves = [
            tensors.pop(f"{MISSED}{i}").numpy().tobytes()
            for i in range(control.missed)
            if f"{MISSED}{i}" in tensors
        ]
        if len(moves) < control.missed:
            raise MessageError("a request lacks changes that it says it holds")
        if control.held:
            slot, schema = f"{HELD}{self.exchange.action}", self._schema_down(control)
            if control.whole:
                held = {spec.name: tensors[spec.name] for spec in schema.tensors}
            else:
                held = self._ours.get(slot) or start_of(schema.tensors, initial)
                if {n: tuple(t.shape) for n, t in held.items()} != {
                    spec.name: spec.shape for spec in schema.tensors
                }:
                    held = start_of(schema.tensors, initial)
            for move in moves:
                held = moved(held, decode(move, schema).tensors)
            if digest(held) != control.held:
                raise MessageError(
                    "this client does not hold the model that the server's changes are of, as after the "
                    "loss of its store; the server sends the whole in its next round"
                )
            self._ours[slot] = held
            tensors |= held
        self.payload = replace(self.payload, tensors=tensors)

    def _schema_down(self, control: _Control) -> Schema:
        """Return the schema of the changes of a request, as the experiment says it."""
        specs = self.exchange.schema_of(self.client).tensors
        if not control.whole:
            specs = tuple(
                TensorSpec(spec.name, spec.shape[1:], spec.dtype)
                for spec in specs
                if spec.shape[:1] == (0,) and not spec.ragged
            )
        schema = coded(Schema(specs), self._settings.down_codec, self._settings)
        return Schema(tuple(spec for spec in schema.tensors if spec.codec))

    def encoded(self, reply: Payload) -> bytes:
        """Return the bytes of a reply."""
        return self._coded(reply)[0]

    def as_read(self, reply: Payload) -> Payload:
        """Return a reply as the server will read it: what its codec loses is lost."""
        return self._coded(reply)[1]

    def stored(self, slots: Mapping[str, Tensors]) -> dict[str, Tensors]:
        """Return what a client stores: what its method does, and what is kept here."""
        return {**slots, **self._ours}

    def _coded(self, reply: Payload) -> tuple[bytes, Payload]:
        """Return a reply's bytes and what the server reads in them; once for each reply."""
        if self._made is None or self._made[0] is not reply:
            if self._control is None:
                self._made = reply, encode(reply, self.exchange.reply_schema), reply
            else:
                self._made = reply, *self._compressed(reply, self._control)
        return self._made[1:]

    def _compressed(self, reply: Payload, control: _Control) -> tuple[bytes, Payload]:
        schema, action = self.exchange.reply_schema, self.exchange.action
        received = self.payload.tensors
        known = {s.name: s for s in Schema.of(received).tensors}
        names = _differences(known, schema, control.changes or ())
        names = names if control.changes is not None else frozenset()
        tensors = {}
        for name, tensor in reply.tensors.items():
            own = tensor.detach()
            tensors[name] = own.float() - received[name].float() if name in names else own
        lossy = [spec for spec in schema.tensors if spec.codec]
        before = self._before(action, control) if lossy else {}
        sign = -1 if self._settings.error_feedback == "ef21" else 1
        wanted = {}
        for spec in lossy:
            own = tensors[spec.name].float()
            if spec.name in before:
                own = own + sign * before[spec.name]
            wanted[spec.name] = own
        tensors |= wanted
        tensors = {n: t.to(reply.tensors[n].dtype) for n, t in tensors.items()}
        if UPDATES in {spec.name for spec in schema.tensors}:
            tensors[UPDATES] = self._updates_before(action, control) + 1
        data, decoded = self._encoded(replace(reply, tensors=tensors), wanted)
        estimate = self._remember(action, wanted, before, decoded)
        read = {}
        for name, tensor in reply.tensors.items():
            own = estimate.get(name, decoded[name]).float() if name in wanted else decoded[name]
            if name in names:
                own = received[name].float() + own.float()
            read[name] = own.to(tensor.dtype)
        return data, replace(reply, tensors=read)

    def _encoded(self, sent: Payload, wanted: Tensors) -> tuple[bytes, Tensors]:
        """Return the bytes of what is sent, with the error of its codec, and what is read in them."""
        schema, rounding = self.exchange.reply_schema, self._rounding(self.exchange.action)
        data = encode(sent, schema, rounding)
        decoded = decode(data, schema).tensors
        if not wanted:
            return data, decoded
        lost = sum(float((own - decoded[n].float()).square().sum()) for n, own in wanted.items())
        whole = sum(float(own.square().sum()) for own in wanted.values())
        error = {CODING_ERROR.name: lost / whole if whole else 0.0}
        if CODING_ERROR in schema.metrics:
            data = with_metrics(data, schema, {**sent.metrics, **error})
        return data, decoded

    def _rounding(self, action: str) -> Callable[[str], np.random.Generator]:
        return lambda name: generator(
            self._seed, f"wire up {action} {name}", self.client, self.exchange.round
        )

    def _before(self, action: str, control: _Control) -> Tensors:
        """Return e, or h of ``ef21``, as this client has it in this round."""
        own = self._settings
        if own.error_feedback == "ef21":
            found = {} if control.afresh else dict(self._ours.get(f"{ESTIMATE}{action}", {}))
            found.pop(COUNT, None)
            return found
        if own.error_feedback == "none":
            return {}
        found = dict(self._ours.get(f"{RESIDUAL}{action}", {}))
        since = int(found.pop(SINCE, torch.tensor(self.exchange.round)))
        absent = max(0, self.exchange.round - since - 1)
        if absent > own.absence_limit:
            return {}
        return {name: tensor * own.absence_decay**absent for name, tensor in found.items()}

    def _updates_before(self, action: str, control: _Control) -> torch.Tensor:
        own = {} if control.afresh else self._ours.get(f"{ESTIMATE}{action}", {})
        return own.get(COUNT, torch.zeros(1, dtype=torch.int64))

    def _remember(self, action: str, wanted: Tensors, before: Tensors, decoded: Tensors) -> Tensors:
        """Keep what error feedback needs in the next round; return h of ``ef21``."""
        kind = self._settings.error_feedback
        if not wanted or kind == "none":
            return {}
        if kind == "classic":
            residual = {name: own - decoded[name].float() for name, own in wanted.items()}
            residual[SINCE] = torch.tensor(self.exchange.round)
            self._ours[f"{RESIDUAL}{action}"] = residual
            return {}
        estimate = {
            name: before[name] + decoded[name].float() if name in before else decoded[name].float()
            for name in wanted
        }
        self._ours[f"{ESTIMATE}{action}"] = {**estimate, COUNT: decoded[UPDATES]}
        return estimate
