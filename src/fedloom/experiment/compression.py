"""What an experiment with ``[wire]`` cannot be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fedloom.methods import METHODS
from fedloom.wire.codecs.sparse import TopK
from fedloom.wire.settings import AUTO, WireSettings, bits_of


def compression_contradictions(parts: Mapping[str, Any]) -> Iterator[str]:
    """Yield what contradicts ``[wire]`` in an experiment's valid sections by name."""
    wire: WireSettings = parts["wire"]
    if not wire.compresses:
        return
    if "method" in parts:
        yield from _method(parts["method"].name, wire)
    if "federation" in parts and wire.chooses:
        rounds = parts["federation"].rounds
        if wire.auto_rounds >= rounds:
            yield (
                f"{_varying(wire, budget=False)} chooses after wire.auto_rounds = {wire.auto_rounds} "
                f"rounds, and federation.rounds = {rounds} leaves none for what is chosen: have fewer "
                "of the former or more of the latter, or name a codec"
            )
    if "privacy" not in parts:
        return
    if parts["privacy"].unit is not None and (wire.budget is not None or wire.chooses):
        yield (
            f"{_varying(wire)}: with privacy.unit = {parts['privacy'].unit!r} codecs would be chosen by "
            "what clients changed, which is no part of the privacy account: name a codec, such as "
            'up = ["int4"]'
        )
        return
    if parts["privacy"].secure_aggregation:
        yield (
            "[wire]: under privacy.secure_aggregation answers are masked integers, which no codec "
            "makes shorter and whose sums none here keeps: leave [wire] out; privacy.sum_bits says how "
            "many bits a number has"
        )
    codec = wire.up_codec
    varies = codec is not None and (codec.entropy is not None or isinstance(codec.reduction, TopK))
    if parts["privacy"].unit == "client" and varies:
        yield (
            f'wire.up = {wire.up!r}: with privacy.unit = "client" the length of an answer, which is '
            "recorded, would depend on rows without noise: take stages of one length, such as "
            'up = ["int4"] or ["ternary"]'
        )
    if parts["privacy"].unit is not None and wire.error_feedback != "none":
        yield (
            f"wire.error_feedback = {wire.error_feedback!r}: with privacy.unit = "
            f"{parts['privacy'].unit!r} what a round lost would enter a later one, of whose privacy "
            "account it is no part: leave it out, with a codec that rounds at random"
        )


def _varying(wire: WireSettings, *, budget: bool = True) -> str:
    """Return the setting that has codecs change in a run, as it is written; a budget, if it counts."""
    if budget and wire.budget is not None:
        return f"wire.budget = {wire.budget!r}"
    return f'wire.{"up" if wire.up == AUTO else "down"} = "auto"'


def _method(name: str, wire: WireSettings) -> Iterator[str]:
    """Yield why a method does not go with these codecs."""
    kind = METHODS[name][1]
    own = kind.declares
    if not own.compression.holds:
        yield (
            f"[wire]: method.name = {name!r} does not go with it: {own.compression.why}; docs/methods.md "
            "says which methods do"
        )
        return
    if unknown := sorted(wire.parts.keys() - set(own.message_parts)):
        has = (
            f"has the parts {', '.join(own.message_parts)}" if own.message_parts else "has no parts"
        )
        yield (
            f"wire.parts.{unknown[0]}: an answer of method.name = {name!r} {has}: "
            + ("name one of them" if own.message_parts else "leave wire.parts out")
        )
    if wire.budget is not None or wire.chooses:
        if kind.asynchronous:
            yield (
                f"{_varying(wire)}: method.name = {name!r} takes answers to requests of earlier rounds, "
                "which have the codecs of then: name a codec"
            )
        elif own.compression_bits:
            yield (
                f"{_varying(wire)}: method.name = {name!r} needs {own.compression_bits} bits of each "
                'number at least, as products of factors make errors larger: use "int8"'
            )
    for key, codec in (("up", wire.up_codec), ("down", wire.down_codec)):
        if codec is None or not own.compression_bits:
            continue
        if codec.reduction is not None or bits_of(codec) < own.compression_bits:
            has = f"{bits_of(codec):.2g} bits a number"
            yield (
                f"wire.{key} = {getattr(wire, key)!r} "
                f"{'leaves numbers out' if codec.reduction is not None else f'has {has}'}, and "
                f"method.name = {name!r} needs {own.compression_bits} bits of each at least, as products "
                'of factors make errors larger: use "int8"'
            )
