"""``fedloom merge``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.commands.app import app, begin_loading, doubt, say
from fedloom.commands.early_checks import refuse_early
from fedloom.settings.suggestions import did_you_mean
from fedloom.storage.output_paths import require_place

if TYPE_CHECKING:
    from fedloom.aggregation.merging import Merging

RULES = ("task_arithmetic", "ties", "dare", "knots")
SPACES = ("product", "factors")


@app.command()
def merge(
    adapters: Annotated[
        list[Path],
        typer.Argument(help="Run folders, or PEFT folders of LoRA adapters.", show_default=False),
    ],
    output: Annotated[Path, typer.Option(help="Folder of the merged adapter.", show_default=False)],
    rule: Annotated[str, typer.Option(help=f"{', '.join(RULES)}.")] = "task_arithmetic",
    weights: Annotated[
        str | None,
        typer.Option(help="One number an adapter: 1,2,1 (default: by rows, where runs say them)."),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(help="Share of entries kept, of ties, knots (0.2) and dare (0.8)."),
    ] = None,
    scale: Annotated[
        float, typer.Option(help="Times the merged change; the number of adapters: their sum.")
    ] = 1.0,
    space: Annotated[
        str,
        typer.Option(
            help="product: of B A, cut to a rank; factors: A and B apart, the mean alone."
        ),
    ] = "product",
    rank: Annotated[
        int | None,
        typer.Option(help="Of the result (default: the largest that is merged).", min=1, max=65536),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of dare.", min=0)] = 0,
) -> None:
    """Merge finished adapters of one base model into one, with no round at all."""
    numbers = _numbers(weights)
    _require_rule(rule, density, scale, space)
    require_place(output, "--output")
    refuse_early(
        lambda: _check(adapters, output, _rule(rule, density, scale, space), numbers, rank)
    )
    begin_loading(quiet=False)
    from fedloom.runs.merge import merge_adapters

    own = _rule(rule, density, scale, space)
    found = merge_adapters(adapters, output, own, numbers, rank, seed)
    for text in found.inputs.doubts:
        doubt(text)
    shares = [weight / sum(found.inputs.weights) for weight in found.inputs.weights]
    for adapter, share in zip(found.inputs.adapters, shares, strict=True):
        by = " by rows" if found.inputs.weighed_by == "rows" else ""
        say(f"{adapter.folder}: rank {adapter.rank}, weight {share:.4f}{by}")
    lost = found.rank_error
    cut = (
        ""
        if lost is None
        else f"; cutting the products to it loses {100 * lost:.3g} % of their norm"
    )
    say(f"merged by {rule}, rank {found.inputs.rank}{cut}")
    say(f"wrote {output}; score it: fedloom evaluate EXPERIMENT.toml --adapter {output}")


def _check(
    adapters: list[Path], output: Path, own: Merging, weights: list[float] | None, rank: int | None
) -> None:
    from fedloom.runs.merge import merge_inputs

    merge_inputs(adapters, output, own, weights, rank)


def _rule(rule: str, density: float | None, scale: float, space: str) -> Merging:
    from fedloom.aggregation.merging import Merging

    return Merging(rule, density, scale, space)  # type: ignore[arg-type]


def _require_rule(rule: str, density: float | None, scale: float, space: str) -> None:
    """Refuse options that no rule has, and numbers out of their ranges."""
    if rule not in RULES:
        raise typer.BadParameter(
            f"--rule {rule}: {did_you_mean(rule, RULES)}it is one of {', '.join(RULES)}"
        )
    if space not in SPACES:
        raise typer.BadParameter(
            f"--space {space}: {did_you_mean(space, SPACES)}it is one of {', '.join(SPACES)}"
        )
    if rule == "knots" and space == "factors":
        raise typer.BadParameter("--rule knots has products alone: leave --space out")
    if rule in ("ties", "dare") and space == "factors":
        raise typer.BadParameter(
            f"--rule {rule} with --space factors would drop entries of the A that all began with: leave "
            "--space out"
        )
    if density is not None and rule == "task_arithmetic":
        raise typer.BadParameter("--density is of ties, dare and knots; task_arithmetic keeps all")
    if density is not None and not 0 < density <= 1:
        raise typer.BadParameter(f"--density {density:g}: it is above 0 and at most 1")
    if not 0 < scale <= 100:
        raise typer.BadParameter(f"--scale {scale:g}: it is above 0 and at most 100")


def _numbers(weights: str | None) -> list[float] | None:
    try:
        return None if weights is None else [float(own) for own in weights.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"--weights {weights}: give numbers with commas between, such as 1,2,1"
        ) from None
