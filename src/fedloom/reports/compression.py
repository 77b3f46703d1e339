"""What compression saved: bytes that were sent beside those of the same messages without a codec."""

from __future__ import annotations

from collections.abc import Sequence

from fedloom.accounting.quantities import human_bytes
from fedloom.reports.client_rounds import turns
from fedloom.storage.run_folder import Record

WAYS = ("up", "down")


def compression_record(run: Record, costs: Sequence[Record]) -> Record:
    """Return codecs, bytes as sent without evaluation, and those of the same messages without a codec.

    Args:
        run: ``run.json`` of a run with ``[wire]``.
        costs: Lines of ``costs.jsonl``.
    """
    own = run["wire"]
    coded = [turn.sent for turn in turns(run, costs)]
    plain = [turn.expected for turn in turns({"traffic": own["plain_traffic"]}, costs)]
    found = {"error_feedback": own["error_feedback"], "client_rounds": len(coded)}
    for way in WAYS:
        found[f"codec_{way}"] = own[way]
        found[f"bytes_{way}"] = sum(getattr(sent, way) for sent in coded)
        found[f"plain_bytes_{way}"] = sum(getattr(sent, way) for sent in plain if sent)
    return found


def times_fewer(record: Record, way: str) -> float:
    """Return how many times fewer bytes were sent than without a codec."""
    return float(record[f"plain_bytes_{way}"] / max(1, record[f"bytes_{way}"]))


def rows(record: Record) -> list[tuple[str, str, str]]:
    """Return (what, how much, measured or derived) of a run with ``[wire]``."""
    found = []
    for way in WAYS:
        codec = record[f"codec_{way}"] or "as it is"
        plain = human_bytes(record[f"plain_bytes_{way}"])
        saved = f"{times_fewer(record, way):.1f} times fewer bytes than {plain}"
        found.append((f"Codec {way}", f"{codec}: {saved}", "measured"))
    if record["error_feedback"] != "none":
        found.append(("Error feedback", str(record["error_feedback"]), "as set"))
    return found
