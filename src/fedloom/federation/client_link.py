"""A client's side of a compressed exchange (``compressed_exchange.py`` says what both sides do)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from fedloom.errors import MessageError
from fedloom.federation.compression_messages import (
    CODING_ERROR,
    CONTROL,
    COUNT,
    ESTIMATE,
    HELD,
    LARGEST_SQUARE,
    MISSED,
    RESIDUAL,
    SINCE,
    SQUARES,
    UPDATES,
    Control,
    as_blob,
    codecs_in,
    coded,
    coded_names,
    dealt_names,
    digest,
    is_change,
    is_difference,
    is_ours,
    moved,
    moved_estimate,
    packed_rows,
    start_of,
    unpacked_rows,
)
from fedloom.randomness import generator
from fedloom.tensors import Tensors
from fedloom.wire.codecs import Generators, pipeline
from fedloom.wire.messages import Exchange, Payload, decode, encode, with_metrics
from fedloom.wire.schema import Schema, TensorSpec
from fedloom.wire.settings import WireSettings

MOST_HELD = 16
"""Largest model that changes may be of, in adapters: methods send one or two sets of its shapes."""


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
    _control: Control | None
    _kept: Mapping[str, Tensors]
    _renewed: dict[str, Tensors] = field(default_factory=dict)
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
        kept = {name: own for name, own in slots.items() if is_ours(name)}
        link = cls(exchange, client, payload, settings, seed, None, kept)
        if CONTROL in payload.tensors:
            link._receive(initial)
        if CONTROL not in payload.tensors and any(s.codec for s in exchange.reply_schema.tensors):
            raise MessageError("the server asks for a coded reply and does not say what it is to")
        return link

    def _receive(self, initial: Tensors) -> None:
        """Take what a compressed request says of itself, and the model that it moves to."""
        tensors = dict(self.payload.tensors)
        self._control = control = Control.read(tensors.pop(CONTROL).numpy().tobytes())
        self._require_allowed(control)
        blobs = {name for name in tensors if name.startswith(MISSED)}
        if len(blobs) != control.missed or blobs != {f"{MISSED}{i}" for i in range(len(blobs))}:
            raise MessageError("a request lacks changes that it says it holds")
        moves = [tensors.pop(f"{MISSED}{i}").numpy().tobytes() for i in range(len(blobs))]
        if control.held:
            slot, schema = f"{HELD}{self.exchange.action}", self._schema_down(control)
            if not control.whole:
                _require_possible(schema, initial)
            if control.whole:
                held = {spec.name: tensors[spec.name] for spec in schema.tensors}
            else:
                held = self._kept.get(slot) or start_of(schema.tensors, initial)
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
            self._renewed[slot] = held
            tensors |= held
        self.payload = replace(self.payload, tensors=tensors)

    def _require_allowed(self, control: Control) -> None:
        """Check the codecs of a request and of its reply.

        Raises:
            MessageError: The experiment does not say them.
        """
        own = self._settings
        if others := codecs_in(self.exchange.reply_schema) - own.allowed_up:
            says = (
                f"wire.up = {own.up!r}" if own.budget is None else f"wire.budget = {own.budget!r}"
            )
            raise MessageError(
                f"the server asks for a reply in {sorted(others)[0]!r}, and the experiment says {says}"
            )
        if control.held and self._codec_down(control) not in own.allowed_down:
            raise MessageError(
                f"the server sends changes in {control.down[:80]!r}, and the experiment says "
                f"wire.down = {own.down!r}"
            )

    def _codec_down(self, control: Control) -> str:
        return control.down or str(self._settings.down_codec or "")

    def _schema_down(self, control: Control) -> Schema:
        """Return the schema of the changes of a request, as the experiment says it."""
        specs = self.exchange.schema_of(self.client).tensors
        if not control.whole:
            specs = tuple(
                TensorSpec(spec.name, spec.shape[1:], spec.dtype)
                for spec in specs
                if spec.shape[:1] == (0,) and not spec.ragged
            )
        schema = coded(Schema(specs), pipeline(self._codec_down(control)), self._settings)
        return Schema(tuple(spec for spec in schema.tensors if spec.codec))

    def encoded(self, reply: Payload) -> bytes:
        """Return the bytes of a reply."""
        return self._coded(reply)[0]

    def as_read(self, reply: Payload) -> Payload:
        """Return a reply as the server will read it: what its codec loses is lost."""
        if self._control is None:  # as it is, or masked, in which its schema is another
            return reply
        return self._coded(reply)[1]

    def stored(self, slots: Mapping[str, Tensors]) -> dict[str, Tensors]:
        """Return what a client stores: what its method does, and what is kept here."""
        return {**slots, **self._kept, **self._renewed}

    def _coded(self, reply: Payload) -> tuple[bytes, Payload]:
        """Return a reply's bytes and what the server reads in them; once for each reply."""
        if self._made is None or self._made[0] is not reply:
            if self._control is None:
                self._made = reply, encode(reply, self.exchange.reply_schema), reply
            else:
                self._made = reply, *self._compressed(reply, self._control)
        return self._made[1:]

    def _compressed(self, reply: Payload, control: Control) -> tuple[bytes, Payload]:
        received, action = self.payload.tensors, self.exchange.action
        changed = {
            name
            for name, tensor in reply.tensors.items()
            if is_difference(name, tensor, received, control.changes)
        }
        tensors = {
            name: own.detach().float() - received[name].float() if name in changed else own.detach()
            for name, own in reply.tensors.items()
        }
        before = {
            name: tensor
            for name, tensor in self._before(action, control).items()
            if not is_change(name, control.changes)
        }
        wanted = self._wanted(tensors, before)
        tensors = {n: t.to(reply.tensors[n].dtype) for n, t in (tensors | wanted).items()}
        if UPDATES in self._names:
            tensors[UPDATES] = self._updates_before(action, control) + 1
        if SQUARES in self._names:
            names = dealt_names(self.exchange.reply_schema, self._settings)
            tensors[SQUARES] = _mean_squares([wanted[name] for name in names])
        data, decoded = self._encoded(replace(reply, tensors=tensors), wanted)
        estimate = self._remember(action, wanted, before, decoded)
        read = {}
        for name, tensor in reply.tensors.items():
            own = estimate[name] if name in wanted and estimate else decoded[name]
            if name in changed:
                own = received[name].float() + own.float()
            read[name] = own.to(tensor.dtype)
        return data, replace(reply, tensors=read)

    def _wanted(self, tensors: Tensors, before: Tensors) -> Tensors:
        """Return the tensors that are coded, with what error feedback adds or takes off."""
        sign, found = -1 if self._settings.error_feedback == "ef21" else 1, {}
        for name in coded_names(self.exchange.reply_schema):
            own = tensors[name].float()
            if name in before and before[name].shape == own.shape:
                own = own + sign * before[name]
            found[name] = own
        return found

    def _encoded(self, sent: Payload, wanted: Tensors) -> tuple[bytes, Tensors]:
        """Return the bytes of what is sent, with the error of its codec, and what is read in them."""
        schema, rounding = self.exchange.reply_schema, self._rounding(self.exchange.action)
        tensors = dict(sent.tensors)
        blobs = {spec.name: own for spec in schema.tensors if (own := as_blob(spec.name))}
        for key, (codec, name) in blobs.items():
            tensors[key] = packed_rows(name, tensors.pop(name), pipeline(codec), rounding)
        data = encode(replace(sent, tensors=tensors), schema, rounding)
        decoded = decode(data, schema).tensors
        for key, (codec, name) in blobs.items():
            before = sent.tensors[name]
            spec = TensorSpec(name, tuple(before.shape), before.dtype)
            decoded[name] = unpacked_rows(decoded.pop(key), spec, pipeline(codec))
        if wanted and CODING_ERROR in schema.metrics:
            error = {CODING_ERROR.name: _relative_error(wanted, decoded)}
            data = with_metrics(data, schema, {**sent.metrics, **error})
        return data, decoded

    @property
    def _names(self) -> set[str]:
        return {spec.name for spec in self.exchange.reply_schema.tensors}

    def _rounding(self, action: str) -> Generators:
        return lambda name: generator(
            self._seed, f"wire up {action} {name}", self.client, self.exchange.round
        )

    def _before(self, action: str, control: Control) -> Tensors:
        """Return e, or h of ``ef21``, as this client has it in this round."""
        own = self._settings
        if own.error_feedback == "none" or control.afresh:
            return {}
        if own.error_feedback == "ef21":
            found = dict(self._kept.get(f"{ESTIMATE}{action}", {}))
            found.pop(COUNT, None)
            return found
        found = dict(self._kept.get(f"{RESIDUAL}{action}", {}))
        since = int(found.pop(SINCE, torch.tensor(self.exchange.round)))
        absent = max(0, self.exchange.round - since - 1)
        if absent > own.absence_limit:
            return {}
        return {name: tensor * own.absence_decay**absent for name, tensor in found.items()}

    def _updates_before(self, action: str, control: Control) -> torch.Tensor:
        own = {} if control.afresh else self._kept.get(f"{ESTIMATE}{action}", {})
        return own.get(COUNT, torch.zeros(1, dtype=torch.int64))

    def _remember(self, action: str, wanted: Tensors, before: Tensors, decoded: Tensors) -> Tensors:
        """Keep what error feedback needs in the next rounds; return h of ``ef21``.

        A tensor that is in no reply of this round keeps what it has (methods send others in turn).
        """
        kind = self._settings.error_feedback
        if not wanted or kind == "none":
            return {}
        if kind == "classic":
            lost = {name: own - decoded[name].float() for name, own in wanted.items()}
            since = {SINCE: torch.tensor(self.exchange.round)}
            self._renewed[f"{RESIDUAL}{action}"] = {**before, **lost, **since}
            return {}
        estimate = moved_estimate(before, decoded, wanted)
        self._renewed[f"{ESTIMATE}{action}"] = {**estimate, COUNT: decoded[UPDATES]}
        return estimate


def _require_possible(schema: Schema, initial: Tensors) -> None:
    """Check the size of what changes are of: it is said, not sent.

    Raises:
        MessageError: It is more than ``MOST_HELD`` adapters.
    """
    size, own = sum(spec.elements for spec in schema.tensors), _elements(initial)
    if size > MOST_HELD * own:
        raise MessageError(
            f"a request is a change of {size} numbers, and this client's adapter has {own}: at most "
            f"{MOST_HELD} times as many are held",
            "oversized",
        )


def _elements(tensors: Tensors) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _mean_squares(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return the mean square of each tensor, (tensors,), float32."""
    squares = [
        float(np.square(own.cpu().numpy(), dtype=np.float64).mean()) if own.numel() else 0.0
        for own in tensors
    ]
    return torch.tensor(squares, dtype=torch.float64).clamp(0, LARGEST_SQUARE).float()


def _relative_error(wanted: Tensors, decoded: Tensors) -> float:
    lost = sum(float((own - decoded[n].float()).square().sum()) for n, own in wanted.items())
    whole = sum(float(own.square().sum()) for own in wanted.values())
    return lost / whole if whole else 0.0
