"""The page of a privacy audit: what attacks found, beside what chance and the stated epsilon allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedloom.errors import OutputError
from fedloom.reports.html import fill, write_page
from fedloom.storage import run_folder as names
from fedloom.storage.run_folder import Record, RunFolder

PAGE = "audit.html"

VERDICTS = {
    True: "PASS: the lower bounds are at or below the stated epsilon",
    False: "FAIL: a lower bound is above the stated epsilon: what was stated does not hold",
    None: "no epsilon was stated, so that there is nothing to compare the lower bounds with",
}

KINDS = {
    "insertion": "a row is there or not",
    "label_flip": "which label a row has",
    "backdoor": "whether a trigger was planted",
}


def write_privacy_audit(folder: Path, target: Path | None = None) -> Path:
    """Write the page of an audit (default: ``audit.html`` in its folder).

    Raises:
        OutputError: The folder holds no audit, or the page cannot be written.
    """
    record = RunFolder(folder).read_record(names.AUDIT)
    if record is None:
        raise OutputError(
            f"{folder} holds no privacy audit ({names.AUDIT}): fedloom audit privacy makes one"
        )
    return write_page(render(record), target or folder / PAGE)


def render(record: Record) -> str:
    """Return the page as HTML."""
    return fill(
        "privacy_audit.html.j2",
        title=f"Privacy audit: {record['name']}",
        record=record,
        lines=summary(record),
        tokens=_token_chart(record["tokens"]),
        rows=_row_chart(record.get("sequences")),
        curve=_curve(record["membership"]),
        confidence=_confidence(record["canaries"]) if record["canaries"]["made"] else "",
        kinds=KINDS,
    )


def summary(record: Record) -> list[str]:
    """Return the findings as sentences, for the top of the page and the terminal."""
    return [
        *_token_lines(record["tokens"]),
        *_row_lines(record.get("sequences")),
        *_inversion_lines(record.get("inversion")),
        *_membership_lines(record["membership"]),
        *_canary_lines(record["canaries"], record["stated"]),
    ]


def _token_lines(own: Mapping[str, Any]) -> list[str]:
    if not own["made"]:
        return [f"Tokens from updates: not attacked, as {own['why']}"]
    worst = own["worst"]
    lines = [
        f"Tokens from updates: at most {worst['share']:.0%} of the distinct tokens of a client's round, "
        f"from {worst['tensor']} of {worst['layer']} in round {worst['round']} (a guess by frequency: "
        f"{worst['guessed_share']:.0%})"
    ]
    found = "LEAK: updates tell more of tokens than a guess, or than noise would"
    return [*lines, found if own["leak"] else "Updates tell no more of tokens than noise would"]


def _row_lines(own: Mapping[str, Any] | None) -> list[str]:
    if own is None:  # an audit of an earlier version
        return []
    if not own["made"]:
        return [f"Rows from updates: not attacked, as {own['why']}"]
    worst = own["worst"]
    rouge = "" if worst["rougeL"] is None else f", ROUGE-L {worst['rougeL']:.2f}"
    extent = "from the first token to the last" if own.get("whole") else "all but the last token"
    return [
        f"Rows from updates: at most {worst['share']:.0%} of the rows of a client's round, {extent}, "
        f"in round {worst['round']}{rouge}" + (" - LEAK" if own["leak"] else "")
    ]


def _inversion_lines(own: Mapping[str, Any] | None) -> list[str]:
    if own is None:  # an audit of an earlier version
        return []
    if not own["made"]:
        return [f"Gradient inversion: not made, as {own['why']}"]
    return [
        f"Gradient inversion of {len(own['updates'])} updates: {own['share']:.0%} of the distinct tokens "
        f"(a guess by frequency: {own['guessed_share']:.0%}), {own['places']:.0%} of places right"
        + (" - LEAK" if own["leak"] else "")
    ]


def _membership_lines(own: Mapping[str, Any]) -> list[str]:
    if not own["made"]:
        return [f"Membership: not attacked, as {own['why']}"]
    return [
        f"Membership by {name}: AUC {score['auc']['value']:.3f} ({score['auc']['low']:.3f} to "
        f"{score['auc']['high']:.3f}), {score['members']} members against {score['others']} others"
        + (" - LEAK" if score["auc"]["low"] > 0.5 else "")
        for name, score in own["scores"].items()
    ]


def _canary_lines(own: Mapping[str, Any], stated: Mapping[str, Any] | None) -> list[str]:
    if not own["made"]:
        return [f"Canaries: not attacked, as {own['why']}"]
    lines = [
        f"Canaries, {KINDS[kind]}: {bound['right']} of {bound['guesses']} guesses right, "
        f"epsilon at least {bound['epsilon']:.3f} ({_confidence(own)}; {bound['canaries']} canaries "
        f"can show {bound['ceiling']:.3f} at most)"
        for kind, bound in own["kinds"].items()
    ]
    claimed = (stated or {}).get("epsilon")
    beside = f" (stated: {claimed:.3f})" if claimed is not None else ""
    most = max(bound["ceiling"] for bound in own["kinds"].values())
    if own["holds"] and claimed is not None and most < claimed:
        beside += (
            f"; so few canaries could not have shown more than {most:.3f} (--canaries plants more)"
        )
    return [*lines, f"{VERDICTS[own['holds']]}{beside}"]


def _confidence(own: Mapping[str, Any]) -> str:
    """Return with which confidence bounds hold; an audit of an earlier version gave 95 % to each."""
    together = "confidence_of_each" in own and len(own["kinds"]) > 1
    return "95 % for all kinds together" if together else "95 %"


def _token_chart(own: Mapping[str, Any]) -> str | None:
    from fedloom.reports import figures

    if not own["made"]:
        return None
    lines = _best_lines(own["rounds"])
    return figures.line_chart(lines, "round", "share of tokens", limits=(0.0, 1.02))


def _best_lines(rounds: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """Return by tensor what the best layer tells in each round, and what a guess does."""
    lines: dict[str, tuple[list[float], list[float]]] = {}
    shown = [(own["tensor"], own["share"]) for own in rounds]
    for tensor in dict.fromkeys(name for name, _ in shown):
        best: dict[int, float] = {}
        for own in rounds:
            if own["tensor"] == tensor:
                best[own["round"]] = max(best.get(own["round"], 0.0), own["share"])
        lines[f"{tensor}, best layer"] = ([float(n) for n in best], list(best.values()))
    guess = {own["round"]: own["guessed_share"] for own in rounds if not own["from_rank"]}
    guess |= {own["round"]: own["guessed_share"] for own in rounds if own["round"] not in guess}
    lines["guess by frequency"] = ([float(n) for n in guess], list(guess.values()))
    return lines


def _row_chart(own: Mapping[str, Any] | None) -> str | None:
    from fedloom.reports import figures

    if own is None or not own["made"]:
        return None
    rounds = [float(one["round"]) for one in own["rounds"]]
    names = {"share": "whole rows", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
    lines = {
        label: (rounds, [one[name] for one in own["rounds"]])
        for name, label in names.items()
        if own["rounds"][0][name] is not None
    }
    return figures.line_chart(lines, "round", "share, or F-measure", limits=(0.0, 1.02))


def _curve(own: Mapping[str, Any]) -> str | None:
    from fedloom.reports import figures

    if not own["made"]:
        return None
    lines = {name: (score["curve"][0], score["curve"][1]) for name, score in own["scores"].items()}
    lines["chance"] = ([0.0, 1.0], [0.0, 1.0])
    bands = {name: tuple(score["band"]) for name, score in own["scores"].items() if "band" in score}
    return figures.line_chart(
        lines, "false positive rate", "true positive rate", bands=bands, limits=(0.0, 1.02)
    )
