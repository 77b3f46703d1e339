"""What a run may say about privacy: one record, and the same sentences wherever it is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedloom.privacy.secure_aggregation.graph import LEAST
from fedloom.privacy.settings import PrivacySettings

NOTHING = (
    "Privacy: nothing is promised. The server sees each client's update, everybody the global adapter, "
    "and both tell of the rows that they were trained on"
)
"""Of a run without noise or sums, which asked for a profile and so wants to be told."""

SUMS = (
    f"Secure aggregation: the server sees sums of the updates of {LEAST} clients or more, and no single "
    "one; what a sum tells of rows it does not hide"
)


CHECKED = (
    "Secure aggregation between machines: each client's own file says whose keys it trusts, and clients "
    "learn each other's numbers and public keys; the server learns of each client how many rows it has "
    "and holds out, and of its work tokens, examples, steps, FLOPs, memory and seconds"
)


def of_settings(settings: PrivacySettings, *, elsewhere: bool = False) -> list[str]:
    """Return what is said of a run for its settings alone, beside the sentences of its figures.

    Args:
        settings: Of the run.
        elsewhere: Whether clients are on other machines.
    """
    if settings.secure_aggregation:
        return [SUMS, *[CHECKED] * elsewhere]
    return [NOTHING] if settings.profile == "research" and settings.unit is None else []


NOT_PRIVATE = "reproducible, therefore not private"

GUARANTEE = "(epsilon, delta) = ("


def promises(said: Sequence[str]) -> bool:
    """Return whether :func:`sentences` promise something: an epsilon, with noise from a secret key."""
    promised = any(GUARANTEE in sentence for sentence in said)
    return promised and not any(NOT_PRIVATE in sentence for sentence in said)


SECRET = (
    "Who was drawn is secret: each client was drawn for each round by a coin of probability {:.4g} that "
    "follows from the noise's key, and nothing that was handed out follows from it but the noisy sums"
)
"""Of a run in which drawing clients counts."""

MECHANISMS = {
    "independent": "noise of each round by itself",
    "tree": "noise correlated over rounds by a binary tree",
    "banded": "noise correlated over {bands} rounds (banded matrix factorisation)",
}
"""How the noise of rounds is correlated, in words."""


def _bounded(record: Mapping[str, Any]) -> str:
    """Return which rounds a client takes part in by the draw, and what its rounds move together."""
    most, apart = record["max_participations"], record["min_separation"]
    mechanism = "independent" if record.get("bands") == 1 else record["mechanism"]
    separated = f", {apart} or more apart" if apart > 1 else ""
    return (
        f"{MECHANISMS[mechanism].format(**record)}; a client is drawn in at most {most} of "
        f"{record['planned_rounds']} rounds{separated}, and moves all releases together by at most "
        f"{record['sensitivity']:.4g} clips"
    )


def _helped(colluding: int) -> str:
    """Return with whose help somebody learns no more than is stated."""
    if not colluding:
        return " without any client's noise,"
    return f" with the noise of up to {colluding} client{'s' if colluding > 1 else ''}"


def sentences(record: Mapping[str, Any]) -> list[str]:
    """Return what ``summary.json`` holds under ``privacy`` in sentences: who learns what, and what not.

    Args:
        record: With unit, epsilon (``None`` where there is no bound), delta, noise_multiplier, clip,
            sampling, steps, accountant, neighbours, seeded and not_covered; where the draw bounds a
            client's rounds also mechanism, min_separation, max_participations, planned_rounds and
            sensitivity; where clients add the noise also noise, colluding, asked, least and relied_on.
    """
    found = []
    amplified = record.get("amplification", False)
    if record["seeded"]:
        found.append(
            f"Privacy: {NOT_PRIVATE}. Noise is drawn from federation.seed "
            "(privacy.seeded = true), and whoever knows the seed can subtract it; the figures hold for "
            "noise from a secret key" + "; who is drawn follows from the seed as well" * amplified
        )
    epsilon, steps = record["epsilon"], record["steps"]
    of = f"{steps} noisy sum{'s' if steps != 1 else ''} of {record['unit']}s' changes"
    who = "whoever receives the model"
    if record.get("noise") == "distributed":
        who += ", the coordinator among them," + _helped(record["colluding"])
        of += (
            ", to which each client added a share of the noise before secure aggregation (that of "
            f"{record['relied_on']} is counted on: of {record['asked']} that are asked "
            f"{record['least']} are left at least)"
        )
    if record["unit"] != "client":
        who += ", the coordinator among them,"
        of = f"{steps} noisy steps at the client that spends most"
    elif "sensitivity" in record:
        of += f", {_bounded(record)}"
    least = " or more" * (record.get("noise") == "distributed")
    numbers = (
        f"noise multiplier {record['noise_multiplier']:.4g}{least}, clip {record['clip']:.4g}, sampling "
        f"counted as {record['sampling']:.4g}"
    )
    if epsilon is None:
        found.append(
            f"Privacy: changes are clipped and get no noise, so that nothing is promised ({numbers})"
        )
    else:
        found.append(
            f"Privacy: {who} learns of any one {record['unit']} no more than "
            f"{GUARANTEE}{epsilon:.4g}, {record['delta']:.4g}) allows; neighbours: "
            f"{record['neighbours']}; {of}, {numbers}; accountant: {record['accountant']}"
        )
    if amplified and not record["seeded"]:
        found.append(SECRET.format(record["sampling"]))
    if record["not_covered"]:
        found.append(f"Not protected: {'; '.join(record['not_covered'])}")
    return found
