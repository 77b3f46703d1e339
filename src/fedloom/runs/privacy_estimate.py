"""What ``[privacy]`` would state of an experiment, and its noise beside its signal; trains nothing.

How long the noise on a mean is beside the longest mean that clipping allows is a closed form: z sqrt(d) /
(q N) for d numbers with clients as units, z sqrt(d) / b with b units expected in a batch. Over T steps or
rounds noise adds up as sqrt(T), and changes that all point one way as T. What that costs in quality is
no closed form: it is derived that where noise is the longer of both, little can be learnt.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from fedloom.accounting.quantities import human_count
from fedloom.experiment.experiment import Experiment
from fedloom.privacy.noise import NoiseSource
from fedloom.privacy.private_mean import ClientLevelPlan
from fedloom.privacy.statement import of_settings
from fedloom.runs.assembly import assemble
from fedloom.runs.client_privacy import RunPrivacy
from fedloom.runs.initial_adapter import find_start, with_adapter_settings
from fedloom.runs.partitioning import partition_data
from fedloom.runs.row_privacy import own_steps, row_privacies, row_statement


def privacy_advice(
    experiment: Experiment, stage: Callable[[str], None] = lambda text: None
) -> list[str]:
    """Return sentences: what would be stated, the noise beside the signal, and what that means.

    Args:
        experiment: As for a run.
        stage: Called with a text about the current work.

    Returns:
        Nothing where the experiment has nothing of privacy.

    Raises:
        FedloomError: The experiment cannot be built, or its budget cannot be met.
    """
    privacy = experiment.privacy
    if privacy.unit is None:
        return of_settings(privacy)
    of_clients = RunPrivacy(experiment) if privacy.unit == "client" else None
    experiment = with_adapter_settings(experiment, find_start(experiment))
    stage("accounting for privacy")
    division = partition_data(experiment)
    parts = assemble(experiment, division, empty=True)
    numbers = sum(tensor.numel() for tensor in parts.initial.values())
    if of_clients is not None:
        record = of_clients.promise(numbers=numbers)
        return [
            *record["sentences"],
            *_amplification(of_clients),
            *_noise_beside_signal(
                record, numbers, of_clients.plan.expected, of_clients.plan.noise_of_rounds
            ),
        ]
    local = parts.local
    hidden = row_privacies(
        experiment, division, parts.method, local.shares, local.participations,
        NoiseSource.fresh("an estimate"),
    )  # fmt: skip
    record = row_statement(experiment, own_steps(experiment, hidden))
    units = next(
        own["units"] for own in record["clients"].values() if own["epsilon"] == record["epsilon"]
    )
    expected = record["sampling"] * units
    return [
        *record["sentences"],
        *of_settings(privacy),
        *_noise_beside_signal(record, numbers, expected),
    ]


def _amplification(of_clients: RunPrivacy) -> list[str]:
    """Return what it costs that who is drawn is no secret, or would cost if it were none."""
    own, other = of_clients.plan, of_clients.otherwise()
    if other is None:
        return []
    given = "true" if other.sampling < 1 else "false"
    return [
        f"Amplification (derived): {_costs(own)}; with privacy.amplification = {given} {_costs(other)}. "
        "With true nothing may be handed out that follows from who was drawn"
    ]


def _costs(plan: ClientLevelPlan) -> str:
    return (
        f"sampling counts as {plan.sampling:.4g}, and epsilon is {plan.promised.epsilon:.4g} with a "
        f"noise multiplier of {plan.noise_multiplier:.4g}"
    )


def _noise_beside_signal(
    record: dict[str, Any],
    numbers: int,
    expected: float,
    factors: tuple[float, float] | None = None,
) -> list[str]:
    """Return how long noise is beside the longest signal, at once and over the run.

    Args:
        record: Of what would be stated.
        numbers: d, numbers that are trained.
        expected: Units whose clipped changes a sum has on average.
        factors: Noise of a release and of their sum, over that of a single one (default: 1 and the root
            of their number).
    """
    z, steps = record["noise_multiplier"], max(1, record["steps"])
    what, many = (
        ("round", "more clients a round")
        if record["unit"] == "client"
        else ("step", "larger batches")
    )
    one, all_of_them = factors or (1.0, math.sqrt(steps))
    single = z * math.sqrt(numbers) / expected
    once, whole = one * single, all_of_them * single / steps
    said = (
        f"Noise and signal (derived): with {human_count(numbers)} trained numbers the noise of a {what} "
        f"is {once:.3g} times as long as the longest mean change can be ({expected:.4g} units expected), "
        f"and over {steps} {what}s {whole:.3g} times, if all changes point one way"
    )
    if whole > 1:
        meaning = (
            "expect to learn little: noise is longer than all that could be learnt; "
            f"{many}, fewer trained numbers (adapter.rank, targets, layers) or a larger epsilon make it "
            "shorter"
        )
    elif once > 1:
        meaning = (
            f"expect a loss of quality: each {what} is mostly noise, of which the run averages a part "
            "away; a smaller learning rate helps"
        )
    else:
        meaning = "expect a small loss of quality, if changes are about as long as the clip"
    return [said, f"Quality (derived, not measured): {meaning}"]
