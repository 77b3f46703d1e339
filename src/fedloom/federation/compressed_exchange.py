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

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from fedloom.errors import OutOfStepError, PluginError
from fedloom.federation.codec_choice import (
    DOWN,
    UP,
    BitBudget,
    HeldOutLoss,
    PresetChoice,
    as_sent,
)
from fedloom.federation.compression_messages import (
    CODED,
    CONTROL,
    MISSED,
    SQUARES,
    UPDATES,
    Control,
    as_blob,
    blob,
    blob_spec,
    codecs_up,
    coded,
    coded_names,
    coded_replies,
    digest,
    is_change,
    is_difference,
    moved,
    moved_estimate,
    start_of,
    unpacked_rows,
)
from fedloom.randomness import generator
from fedloom.storage.checkpoint import CLIENT
from fedloom.tensors import Tensors, part_of, tensor_bytes
from fedloom.wire.codecs import Generators, Pipeline, pipeline
from fedloom.wire.messages import Exchange, Payload, Reply, decode, encode
from fedloom.wire.schema import Schema, TensorSpec
from fedloom.wire.settings import AUTO, WireSettings

UNKNOWN = -1
"""Version of a client of which it is not known what it holds."""

MOST_ROUNDS = 1000
"""Rounds of which it is known which version was sent; the client of an asynchronous answer that is older
is sent the whole."""


def is_compressed(reply: Schema) -> bool:
    """Return whether something of a reply is coded."""
    return any(spec.codec or spec.name.startswith(CODED) for spec in reply.tensors)


@dataclass(frozen=True)
class _Held:
    """The model that clients hold for one action.

    Attributes:
        tensors: h.
        version: How often it has moved.
        source: SHA-256 of the method's model that it was last moved towards.
        missed: The last of the moves, each as an encoded message; together no longer than h.
        default: Version of a client that has not answered yet.
    """

    tensors: Tensors
    version: int
    source: str = ""
    missed: tuple[bytes, ...] = ()
    default: int = 0

    @cached_property
    def digest(self) -> str:
        """SHA-256 of h, which every request of a round names."""
        return digest(self.tensors)


@dataclass
class Compression:
    """The server's side in the loop of rounds.

    Attributes:
        settings: ``[wire]``.
        seed: The experiment's, from which rounding is drawn.
        initial: The adapter as it is initialised.
        started: Whether clients may begin with other ones, of an earlier run.
        loss: Of the held-out rows, by which a preset is chosen; ``None`` where there are none.
    """

    settings: WireSettings
    seed: int
    initial: Tensors
    started: bool = False
    loss: HeldOutLoss | None = None
    _held: dict[str, _Held] = field(default_factory=dict)
    _versions: dict[str, dict[int, int]] = field(default_factory=dict)
    _estimates: dict[str, dict[int, Tensors]] = field(default_factory=dict)
    _updates: dict[str, dict[int, int]] = field(default_factory=dict)
    _afresh: dict[str, set[int]] = field(default_factory=dict)
    _pending: dict[int, tuple[Tensors, int]] = field(default_factory=dict)
    _sent: dict[str, dict[int, int]] = field(default_factory=dict)
    _moves: bool = False

    def __post_init__(self) -> None:
        """Have codecs chosen where the settings name none."""
        chooses = self.settings.chooses
        self.choice = PresetChoice(self.settings, self.seed, self.loss) if chooses else None
        self.budget = BitBudget(self.settings) if self.settings.budget is not None else None

    @classmethod
    def of(
        cls,
        settings: WireSettings,
        seed: int,
        initial: Tensors,
        *,
        started: bool = False,
        loss: HeldOutLoss | None = None,
    ) -> Compression | None:
        """Return that of a run, ``None`` where tensors are sent as they are."""
        return cls(settings, seed, initial, started, loss) if settings.compresses else None

    def carried(self, exchange: Exchange) -> Exchange:
        """Return an exchange as it is carried; itself where nothing of it is coded.

        Raises:
            PluginError: It is masked.
            SettingsError: The budget does not suffice, or a codec cannot be chosen for it.
        """
        reply = self._coded_up(exchange)
        down = self._coded_down(exchange)
        if not down and reply == exchange.reply_schema:
            return exchange
        if exchange.masking is not None:
            raise PluginError(
                f"{exchange.action!r} does not go with [wire], which the method's declaration says it "
                "does: its answers are masked"
            )
        self._pending, self._moves = {}, bool(down)
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

    def settle(self, exchange: Exchange, replies: Collection[Reply]) -> None:
        """Let what those hold and sent whose answers count be known; of the others it is not known."""
        action, accepted = exchange.action, {reply.client for reply in replies}
        if self.choice is not None:
            self.choice.measure(exchange, replies)
        if exchange.plain is None:
            return
        if self._moves and action in self._held:
            sent, known = self._sent[action], self._versions.setdefault(action, {})
            known |= dict.fromkeys(exchange.requests, UNKNOWN)
            known |= {r.client: sent.get(exchange.round - r.staleness, UNKNOWN) for r in replies}
        if self.budget is not None:
            self.budget.settle(action, accepted)
        for client in self._pending.keys() & accepted:
            estimate, updates = self._pending[client]
            self._estimates.setdefault(action, {})[client] = estimate
            self._updates.setdefault(action, {})[client] = updates
        self._pending = {}
        if self.settings.error_feedback != "none":
            # a client's store is put aside before an answer of an asynchronous round is refused
            lost = exchange.requests.keys() - accepted if exchange.plain.buffered else set()
            afresh = (self._afresh.get(action, set()) - accepted) | lost
            if afresh or action in self._afresh:
                self._afresh[action] = afresh

    def record(self) -> dict[str, Any]:
        """Return what the record of a round says of codecs that are not named in the experiment."""
        found = self.choice.record() if self.choice is not None else {}
        return found | (self.budget.record() if self.budget is not None else {})

    def saved(self) -> tuple[dict[str, Any], Tensors]:
        """Return what a checkpoint keeps: facts as plain JSON, and tensors."""
        facts: dict[str, Any] = {}
        tensors: Tensors = {}
        for action, own in self._held.items():
            known = {str(c): version for c, version in self._versions.get(action, {}).items()}
            facts.setdefault("held", {})[action] = {
                "version": own.version,
                "source": own.source,
                "default": own.default,
                "sent": {str(round): v for round, v in self._sent.get(action, {}).items()},
                "missed": len(own.missed),
                "clients": known,
                "names": list(own.tensors),
            }
            tensors |= {f"held/{action}/{name}": t for name, t in own.tensors.items()}
            tensors |= {f"missed/{action}/{i}": blob(one) for i, one in enumerate(own.missed)}
        for action in self._updates.keys() | self._afresh.keys():
            updates, afresh = self._updates.get(action, {}), sorted(self._afresh.get(action, ()))
            counts = {str(client): count for client, count in updates.items()}
            facts.setdefault("estimates", {})[action] = {"updates": counts, "afresh": afresh}
            for client, estimate in self._estimates.get(action, {}).items():
                tensors |= {f"{CLIENT}{client:04d}/{action}/{n}": t for n, t in estimate.items()}
        if self.choice is not None:
            facts["choice"] = self.choice.saved()
        if self.budget is not None:
            facts["budget"] = self.budget.saved()
        return facts, tensors

    def restore(self, facts: Mapping[str, Any], tensors: Tensors) -> None:
        """Go on from what :meth:`saved` returned."""
        if self.choice is not None:
            self.choice.restore(facts["choice"])
        if self.budget is not None:
            self.budget.restore(facts["budget"])
        for action, own in facts.get("held", {}).items():
            missed = (tensors[f"missed/{action}/{i}"] for i in range(own["missed"]))
            self._held[action] = _Held(
                {name: tensors[f"held/{action}/{name}"] for name in own["names"]},
                own["version"],
                own["source"],
                tuple(one.numpy().tobytes() for one in missed),
                own["default"],
            )
            self._versions[action] = {int(c): version for c, version in own["clients"].items()}
            self._sent[action] = {
                int(round): version for round, version in own.get("sent", {}).items()
            }
        of_clients: dict[int, Tensors] = {}
        for name, tensor in tensors.items():
            if name.startswith(CLIENT):
                number, _, rest = name.removeprefix(CLIENT).partition("/")
                of_clients.setdefault(int(number), {})[rest] = tensor
        for action, own in facts.get("estimates", {}).items():
            self._updates[action] = {int(c): count for c, count in own["updates"].items()}
            self._afresh[action] = set(own["afresh"])
            self._estimates[action] = {}
            for client in list(self._updates[action]):
                found = part_of(of_clients.get(client, {}), action)
                if found:
                    self._estimates[action][client] = found
                else:  # it was forgotten, and holds nothing
                    del self._updates[action][client]
                    self._afresh[action].add(client)
                    self._versions.setdefault(action, {})[client] = UNKNOWN

    def _coded_up(self, exchange: Exchange) -> Schema:
        """Return the schema of replies as they are sent."""
        plain, own = exchange.reply_schema, self.settings
        if self.budget is not None:
            return self.budget.coded(exchange.action, plain)
        if self.choice is not None:
            self.choice.require_possible(exchange)
        chosen = self.choice.codec(UP) if self.choice is not None and own.up == AUTO else ""
        coded = coded_replies(plain, codecs_up(own, chosen or str(own.up_codec or "")))
        return as_sent(coded, own) if is_compressed(coded) else coded

    @property
    def _down(self) -> Pipeline | None:
        """The codec of what clients are sent, where it is known by now."""
        if self.choice is None or self.settings.down != AUTO:
            return self.settings.down_codec
        chosen = self.choice.codec(DOWN)
        return pipeline(chosen) if chosen else None

    def _coded_down(self, exchange: Exchange) -> tuple[TensorSpec, ...]:
        """Return the tensors of a request that are sent as changes.

        These are none where clients are sent different ones, or where nothing of them comes back.
        """
        codec, requests = self._down, exchange.requests.values()
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
                plain = exchange.request_to(client)
                made[key] = self._request(exchange, plain, held, missing, down, afresh=afresh)
            requests[client], schemas[client] = made[key]
        return requests, schemas

    def _missing(self, action: str, client: int, held: _Held | None) -> int | None:
        """Return how many moves a client lacks, ``None`` where it is sent the whole."""
        if held is None:
            return None
        version = self._versions.get(action, {}).get(client, held.default)
        lacking = held.version - version
        if version == UNKNOWN or not 0 <= lacking <= len(held.missed):
            return None
        return lacking

    def _advanced(self, exchange: Exchange, down: tuple[TensorSpec, ...]) -> _Held:
        """Move the model that clients hold towards the method's, unless it was by this very model."""
        action = exchange.action
        sent = exchange.sent_to(next(iter(exchange.requests)))
        wanted = {spec.name: sent[spec.name] for spec in down}
        source, held = digest(wanted), self._held.get(action)
        if held is None and self.settings.down == AUTO:  # clients were sent the whole until now
            held = _Held(wanted, 0, source, default=UNKNOWN)
        elif held is None:
            default = UNKNOWN if self.started else 0
            held = _Held(start_of(down, self.initial), 0, default=default)
        elif {n: t.shape for n, t in held.tensors.items()} != {
            n: t.shape for n, t in wanted.items()
        }:
            self._versions[action] = {}
            held = _Held(wanted, held.version + 1, source, default=UNKNOWN)
        if held.source != source:
            change = {
                n: (t.float() - held.tensors[n].float()).to(t.dtype) for n, t in wanted.items()
            }
            schema = Schema(down)
            move = encode(Payload(change), schema, self._rounding(action, held.version))
            missed, most = [*held.missed, move], tensor_bytes(wanted)
            while sum(map(len, missed)) > most and len(missed) > 1:
                del missed[0]
            after = moved(held.tensors, decode(move, schema).tensors)
            held = replace(
                held, tensors=after, version=held.version + 1, source=source, missed=tuple(missed)
            )
        self._held[action] = held
        sent_before = {**self._sent.get(action, {}), exchange.round: held.version}
        latest = sorted(sent_before)[-(MOST_ROUNDS if exchange.buffered else 1) :]
        self._sent[action] = {round: sent_before[round] for round in latest}
        return held

    def _rounding(self, action: str, version: int) -> Generators:
        return lambda name: generator(self.seed, f"wire down {action} {version} {name}")

    def _request(
        self,
        exchange: Exchange,
        plain: Payload,
        held: _Held | None,
        missing: int | None,
        down: tuple[TensorSpec, ...],
        *,
        afresh: bool,
    ) -> tuple[bytes, Schema]:
        """Return a request as it is sent, with its schema.

        In place of a tensor that is sent as changes is one without elements, which says its shape.
        """
        names = {spec.name for spec in down}
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
        control = Control(
            held.digest if held is not None else "",
            missing is None,
            missing or 0,
            exchange.changes_replied,
            afresh,
            str(self._down or "") if self.settings.down == AUTO else "",
        )
        blobs[CONTROL] = control.packed()
        specs += [blob_spec(name, own) for name, own in blobs.items()]
        tensors |= {name: blob(own) for name, own in blobs.items()}
        schema = replace(exchange.request_schema, tensors=tuple(specs))
        return encode(Payload(tensors, plain.numbers, plain.metrics), schema), schema

    def estimated(
        self, action: str, client: int, change: Tensors, names: Collection[str], updates: int
    ) -> Tensors:
        """Return a client's change as ``ef21`` estimates it now, once it has moved its h so often.

        Raises:
            OutOfStepError: Server and client have not moved h equally often.
        """
        known = self._updates.get(action, {}).get(client, 0)
        before = self._estimates.get(action, {}).get(client, {})
        if updates == 1:
            before = {}  # it has begun anew, whether it was told to or its store was lost
        elif updates != known + 1:
            self._afresh.setdefault(action, set()).add(client)
            raise OutOfStepError(
                f"it has moved its estimate {updates - 1} times and the server {known} times; it begins "
                "anew in its next round"
            )
        after = moved_estimate(before, change, names)
        self._pending[client] = after, updates
        return {**change, **{name: after[name].clone() for name in names}}


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

    def read(self, client: int, data: bytes) -> Payload:
        """Return a reply with the tensors that its schema had before it was coded."""
        payload = decode(data, self.schema)
        change = self._uncoded(payload.tensors)
        updates, squares = change.pop(UPDATES, None), change.pop(SQUARES, None)
        if squares is not None and self.compression.budget is not None:
            self.compression.budget.read(client, self.schema, squares)
        if updates is not None:
            change = self.compression.estimated(
                self.exchange.action, client, change, self._lossy, int(updates)
            )
        changes = self.exchange.changes_replied
        sent: Tensors = {} if changes is None else self.exchange.sent_to(client)
        found = {}
        for spec in self.exchange.reply_schema.tensors:
            own = change[spec.name]
            if is_difference(spec.name, own, sent, changes):
                own = sent[spec.name].float() + own.float()
            found[spec.name] = own.to(spec.dtype)
        return replace(payload, tensors=found)

    @property
    def _lossy(self) -> list[str]:
        """The names of the tensors that are coded and have an estimate."""
        names = coded_names(self.schema)
        return [name for name in names if not is_change(name, self.exchange.changes_replied)]

    def _uncoded(self, tensors: Tensors) -> Tensors:
        """Return the tensors of a reply with those that came as bytes of their own."""
        found, specs = {}, {spec.name: spec for spec in self.exchange.reply_schema.tensors}
        for key, tensor in tensors.items():
            own = as_blob(key)
            if own is None:
                found[key] = tensor
            else:
                codec, name = own
                found[name] = unpacked_rows(tensor, specs[name], pipeline(codec))
        return found
