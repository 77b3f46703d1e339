"""What compression saved: bytes that were sent beside those of the same messages without a codec."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from fedloom.accounting.quantities import human_bytes
from fedloom.reports.client_rounds import turns
from fedloom.storage.run_folder import Record

WAYS = ("up", "down")

AUTO, NOTHING = "auto", "as it is"
"""What ``run.json`` says of a codec that is chosen in the run, and what is said of none."""


def compression_record(run: Record, costs: Sequence[Record], rounds: Sequence[Record]) -> Record:
    """Return codecs, bytes as sent without evaluation, and those of the same messages without a codec.

    Args:
        run: ``run.json`` of a run with ``[wire]``.
        costs: Lines of ``costs.jsonl``.
        rounds: Lines of ``rounds.jsonl``, whose last one says what was chosen.
    """
    own = run["wire"]
    coded = [turn.sent for turn in turns(run, costs)]
    plain = [turn.expected for turn in turns({"traffic": own["plain_traffic"]}, costs)]
    found = {"error_feedback": own["error_feedback"], "client_rounds": len(coded)}
    for way in WAYS:
        found[f"codec_{way}"] = own[way]
        found[f"bytes_{way}"] = sum(getattr(sent, way) for sent in coded)
        found[f"plain_bytes_{way}"] = sum(getattr(sent, way) for sent in plain if sent)
    for key in ("budget", "parts"):
        if own.get(key):
            found[key] = own[key]
    last: Record = (rounds[-1].get("wire") if rounds else None) or {}
    if "auto" in last:
        found["auto"] = last["auto"]
    if "budget" in last:
        found["dealt"] = last["budget"]
    return found


def codec_text(record: Record, way: str) -> str:
    """Return which codec a way had, and which one was chosen."""
    text = str(record[f"codec_{way}"]) or NOTHING
    if text == AUTO:
        chosen = record.get("auto", {}).get("chosen", {}).get(way)
        text += f', "{chosen}" was chosen' if chosen else ", not chosen yet"
    if way == "up" and record.get("budget"):
        text = f"by a budget of {record['budget']}"
    if way == "up" and record.get("parts"):
        own = (f"{part} {codec or NOTHING}" for part, codec in record["parts"].items())
        text += f" ({', '.join(own)})"
    return text


def times_fewer(record: Record, way: str) -> float:
    """Return how many times fewer bytes were sent than without a codec."""
    return float(record[f"plain_bytes_{way}"] / max(1, record[f"bytes_{way}"]))


def rows(record: Record) -> list[tuple[str, str, str]]:
    """Return (what, how much, measured or derived) of a run with ``[wire]``."""
    found = []
    for way in WAYS:
        codec = codec_text(record, way)
        plain = human_bytes(record[f"plain_bytes_{way}"])
        saved = f"{times_fewer(record, way):.1f} times fewer bytes than {plain}"
        found.append((f"Codec {way}", f"{codec}: {saved}", "measured"))
    if record["error_feedback"] != "none":
        found.append(("Error feedback", str(record["error_feedback"]), "as set"))
    if dealt := record.get("dealt"):
        each = ", ".join(f"{number} {codec}" for codec, number in dealt["tensors"].items())
        most = f"{each}; at most {human_bytes(dealt['most_bytes'])}"
        found.append(("Tensors of an answer by codec, last round", most, "derived"))
    for way, presets in record.get("auto", {}).get("errors", {}).items():
        each = ", ".join(f"{name} {fmean(own):.2g}" for name, own in presets.items())
        what = f"Error of the mean in each preset, {way}, first rounds"
        found.append((what, each, "measured"))
    for way, costs in record.get("auto", {}).get("costs", {}).items():
        each = ", ".join(f"{name} {own:.2g}" for name, own in costs.items())
        what = f"Share of the fall of the held-out loss that each preset costs, {way}, first rounds"
        found.append((what, each, "measured"))
    return found
