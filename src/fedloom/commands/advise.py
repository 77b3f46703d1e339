"""``fedloom advise``."""

from __future__ import annotations

from typing import Annotated

import typer

from fedloom.commands.app import (
    Assignments,
    ExperimentFile,
    app,
    begin_loading,
    check_rows,
    experiment_from,
)
from fedloom.commands.early_checks import refuse_early


@app.command()
def advise(
    experiment: ExperimentFile,
    uplink: Annotated[str, typer.Option(help="From a client, a second.")] = "20Mbit",
    downlink: Annotated[str, typer.Option(help="To a client, a second.")] = "100Mbit",
    latency: Annotated[str, typer.Option(help="Of a message there and back.")] = "30ms",
    client_memory: Annotated[str, typer.Option(help="That a client has for training.")] = "8GB",
    speed: Annotated[
        str, typer.Option(help="That a client's device really does a second.")
    ] = "1TFLOP",
    assignments: Assignments = None,
) -> None:
    """Say what each framework would cost a client in a round, which fit, which to try; trains nothing.

    With [privacy]: epsilon, noise multiplier, and the noise beside what can be learnt.
    """
    from fedloom.accounting.network import Link
    from fedloom.accounting.quantities import parse_quantity

    try:
        link = Link(
            parse_quantity(uplink, "bit"),
            parse_quantity(downlink, "bit"),
            parse_quantity(latency, "s"),
            parse_quantity(speed, "FLOP"),
        )
        memory = parse_quantity(client_memory, "B")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    refuse_early(lambda: check_rows(experiment, assignments))
    begin_loading(quiet=False)
    from fedloom.commands.terminal import estimate_table, make_console, working
    from fedloom.runs.cost_estimate import advise as count
    from fedloom.runs.cost_estimate import recommend
    from fedloom.runs.privacy_estimate import privacy_advice

    settings, console = experiment_from(experiment, assignments), make_console()
    with working(console, "reading the rows") as stage:
        said = privacy_advice(settings, stage)  # a budget that cannot be met is refused first
        options = count(settings, link, memory, stage=stage)
    console.print(estimate_table(options))
    for framework, problem in dict.fromkeys((o.framework, o.problem) for o in options if o.problem):
        console.print(
            f"{framework} cannot be used here: {problem}", style="yellow", highlight=False
        )
    for sentence in (recommend(options), *said):
        console.print(sentence, highlight=False, soft_wrap=True, markup=False)
