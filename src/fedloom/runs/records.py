"""Records of a run: the content of the files in its folder, as plain JSON.

Compute only; ``run.py`` decides when and writes. What each file holds stands in docs/run-folder.md.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import math
import platform
import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text as Shown

from fedloom.accounting.costs import REPEATED, SERVER, SUMMED
from fedloom.accounting.quantities import human_bytes, human_flops, human_seconds
from fedloom.accounting.traffic import to_record
from fedloom.data.examples import (
    Choice,
    Example,
    Feedback,
    Instruction,
    Labelled,
    Preference,
    Text,
    Tools,
    first_answer,
    plain_text,
)
from fedloom.data.stored_rows import are_desirable
from fedloom.display.untrusted_text import label
from fedloom.evaluation.metrics import PRIMARY_METRICS, PrimaryMetric
from fedloom.evaluation.reward_models import reward_model_digest
from fedloom.experiment.experiment import Experiment
from fedloom.federation.asynchronous import records_digest
from fedloom.federation.devices import trace_digest
from fedloom.federation.protocol import EVALUATE
from fedloom.federation.records import Evaluation, RoundRecord
from fedloom.methods.contract.closed_forms import compressed_traffic
from fedloom.methods.contract.method import Method
from fedloom.methods.contract.unseen_clients import AFTER
from fedloom.objectives.base import Objective
from fedloom.reports import row_account
from fedloom.rewards.functions import MODEL
from fedloom.runs.assembly import RunComponents
from fedloom.runs.client_privacy import selection_of
from fedloom.runs.code_digests import MadeWith, plugins_record
from fedloom.runs.initial_adapter import Start
from fedloom.runs.model_building import of_server
from fedloom.runs.partitioning import PartitionedData
from fedloom.runs.progress import trained_tokens
from fedloom.statistics.intervals import Sample, change, sample_interval
from fedloom.storage import run_folder as names
from fedloom.training.layout import tokens_per_pass
from fedloom.training.memory import most_memory
from fedloom.training.steps import row_tokens
from fedloom.wire.codecs import pipeline
from fedloom.wire.settings import AUTO

PACKAGES = ("torch", "transformers", "peft", "datasets", "safetensors", "numpy", "pydantic")


SIMULATION = "simulation"
"""Name of the engine with all clients in this process."""


def run_record(
    folder: Path,
    experiment: Experiment,
    parts: RunComponents,
    made: MadeWith,
    id: str,
    engine: str,
) -> dict[str, Any]:
    """Return the content of ``run.json``: all that is known before the first round."""
    division = parts.division
    trained = sum(p.numel() for p in parts.model.parameters.values())
    everything = sum(p.numel() for p in parts.model.model.parameters())
    own = versions()
    again = [
        "fedloom",
        "run",
        f"{folder}/{names.EXPERIMENT}",
        *(("--engine", engine) if engine != SIMULATION else ()),
        "--set",
        f"output.folder={folder}-again",
    ]
    return {
        "name": experiment.name,
        "id": id,
        "fedloom": own.pop("fedloom"),
        "versions": own,
        "seed": experiment.federation.seed,
        "engine": engine,
        "command": made.call(f"{folder}/{names.EXPERIMENT}") if made else shlex.join(again),
        "made_with": made.to_record(),
        "plugins": plugins_record(experiment),
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "device": str(parts.model.device),
        "tokens_per_pass": _tokens_per_pass(experiment, parts),
        "model": {
            "name": of_server(experiment).model.path,
            "sha256": parts.model_digest,
            "parameters": everything - trained,
            "trainable": trained,
        },
        "data": _data_record(experiment, parts),
        "classes": list(division.classes),
        "method": experiment.method.name,
        "selection": experiment.selection.model_dump(),
        "method_role": _role(parts.method),
        "sections": [
            asdict(own) for own in (*parts.method.sections, *selection_of(experiment).sections)
        ],
        "client_memory": _client_memory(experiment, parts),
        "traffic": to_record(compressed_traffic(parts.method, parts.initial, experiment.wire)),
        "wire": _wire_record(experiment, parts),
        "promise": parts.method.privacy_statement(),
        "metric": asdict(PRIMARY_METRICS[division.judged]),
        "fingerprint": fingerprint(experiment, division, made),
    }


def _wire_record(experiment: Experiment, parts: RunComponents) -> dict[str, Any] | None:
    """Return how tensors are compressed, ``None`` where they are sent as they are."""
    wire = experiment.wire
    if not wire.compresses:
        return None
    return {
        "up": str(wire.up_codec or (AUTO if wire.up == AUTO else "")),
        "down": str(wire.down_codec or (AUTO if wire.down == AUTO else "")),
        "budget": wire.budget,
        "parts": {part: str(pipeline(own)) if own else "" for part, own in wire.parts.items()},
        "error_feedback": wire.error_feedback,
        "numbers": sum(tensor.numel() for tensor in parts.initial.values()),
        "plain_traffic": to_record(parts.method.traffic(parts.initial)),
    }


def _data_record(experiment: Experiment, parts: RunComponents) -> dict[str, Any]:
    """Return what ``run.json`` has under ``data``: where rows are from, and how many are what."""
    division = parts.division
    return {
        "source": ", ".join(dict.fromkeys(experiment.data.all_sources)),
        "kind": division.loaded.kind,
        "max_length": parts.max_length,
        "train": sum(parts.engine.sizes().values()),
        "tokens": sum(int(row_tokens(own).sum()) for own in parts.local.shares.values()) or None,
        "client_held_out": sum(len(rows) for rows in division.held_out.values()),
        "global_held_out": len(division.test),
        "malformed": parts.accounts.malformed,
        "bad_rows": [str(row) for row in parts.bad_rows[:20]],
        "dropped": parts.accounts.dropped,
        "account": parts.accounts.to_record(),
        "digest": division.loaded.digest,
        "held_out_rows": held_out_rows(
            [division.test[i] for i in parts.evaluator.held_out.share.tokens.index]
        ),
        "feedback": _feedback_record(experiment, division),
    }


def held_out_rows(rows: Iterable[Example]) -> list[str]:
    """Return a name for each row by its content, so that runs are compared by rows that both have."""
    seen: dict[str, int] = {}
    found = []
    for row in rows:
        name = hashlib.sha256(repr(replace(row, row=0)).encode()).hexdigest()[:12]
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return found


def start_record(
    experiment: Experiment, start: Start | None, objective: Objective
) -> dict[str, Any] | None:
    """Return the start of a run and its reference model; ``None`` for a new adapter."""
    if start is None:
        return None
    return {
        "name": start.name,
        "run": start.run,
        "sha256": start.digests(),
        "clients": sorted(start.clients),
        "reference": experiment.reference if objective.needs_reference else None,
    }


def _tokens_per_pass(experiment: Experiment, parts: RunComponents) -> int | None:
    """Return the tokens of a pass, ``None`` where examples are counted or models have other numbers.

    Where halves work on a batch together its examples are counted, also where the clients' are elsewhere.
    """
    if not parts.method.whole_at_clients:
        return None
    models = [parts.model, *(own.model for own in parts.local.resources.values())]
    found = {tokens_per_pass(experiment.training, model) for model in models}
    return found.pop() if len(found) == 1 else None


def _client_memory(experiment: Experiment, parts: RunComponents) -> float | None:
    """Return bytes that training takes on the client that needs most, derived, if it is known here."""
    engine, quantization = parts.local, experiment.model.quantization
    clients = ((engine.resources[client].model, share) for client, share in engine.shares.items())
    return most_memory(clients, experiment.training, quantization, engine.objective)


def _role(method: Method) -> dict[str, object]:
    """Return what a report of several methods must know of one."""
    own = method.declares
    personal = method.own_models or method.personal
    return {
        "title": own.title,
        "kind": own.role,
        "reference": own.reference,
        "personal": personal and own.role == "method",
    }


def _feedback_record(experiment: Experiment, division: PartitionedData) -> dict[str, Any] | None:
    """Return the account of pairs; counts are of the actual partition, not of the plan."""
    feedback = division.feedback
    if feedback is None:
        return None
    desirable = [are_desirable(own) for own in feedback.rows.values()]
    return {
        "arrangement": experiment.partition.feedback,
        "pairs": feedback.pairs,
        "rows": sum(map(len, desirable)),
        "desirable": sum(int(own.sum()) for own in desirable),
        "intact_share": feedback.intact_share,
        "expected_intact_share_if_spread": feedback.expected_intact_share,
        "single_class_clients": sum(len(np.unique(own)) == 1 for own in desirable),
    }


def versions() -> dict[str, str]:
    """Return the versions of what shapes results: fedloom, its dependencies, Python, the machine."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    return found | {name: importlib.metadata.version(name) for name in ("fedloom", *PACKAGES)}


def fingerprint(experiment: Experiment, division: PartitionedData, made: MadeWith) -> str:
    """SHA-256 over everything that shapes the results, except the model's weights (checked apart)."""
    table = experiment.to_table()
    del table["output"], table["name"]
    public = hashlib.sha256(repr(division.public).encode()).hexdigest()
    own = made.to_record()
    facts = [table, division.loaded.digest, own, public]
    if (trace := trace_digest(experiment.simulation.devices)) is not None:
        facts.append(trace)
    if (records := records_digest(experiment.simulation.replayed)) is not None:
        facts.append(records)
    if rewards := _reward_models(experiment):
        facts.append(rewards)
    text = json.dumps(facts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _reward_models(experiment: Experiment) -> dict[str, str]:
    """Return the SHA-256 of each reward model that answers are rewarded by, by the reward's name."""
    groups = experiment.clients.groups.values()
    own = getattr(experiment.objective, "rewards", None) or []
    names = {*own, *(name for group in groups for name in group.rewards or [])}
    return {
        name: reward_model_digest(name.removeprefix(MODEL))
        for name in sorted(names)
        if name.startswith(MODEL)
    }


def partition_record(
    experiment: Experiment,
    division: PartitionedData,
    sizes: Mapping[int, int] | None = None,
    held_out: Mapping[int, int] | None = None,
) -> dict[str, Any]:
    """Return the content of ``partition.json``.

    Args:
        experiment: Says how rows are dealt.
        division: How they were dealt here.
        sizes: Rows that each client says it trains on, where clients alone know them.
        held_out: Rows that each says it is judged by, where clients alone know them.
    """
    shares = division.shares
    if sizes is not None and held_out is not None and not _are_partitioned(division, sizes):
        return {
            "kind": "own",
            "column": None,
            "values": ["all"],
            "clients": [
                {
                    "client": client,
                    "train": rows,
                    "held_out": held_out.get(client, 0),
                    "counts": {"all": rows},
                }
                for client, rows in sorted(sizes.items())
            ],
        }
    return {
        "kind": experiment.partition.kind,
        "column": shares.column,
        "values": list(shares.values),
        "clients": [
            {
                "client": client,
                "train": len(division.train[client]),
                "held_out": len(division.held_out[client]),
                "counts": dict(zip(shares.values, counts, strict=True)),
            }
            for client, counts in enumerate(shares.counts)
        ],
    }


def _are_partitioned(division: PartitionedData, sizes: Mapping[int, int]) -> bool:
    """Return whether clients elsewhere hold the rows that were dealt here."""
    return bool(division.train) and all(
        client in division.train and len(division.train[client]) == rows
        for client, rows in sizes.items()
    )


def partition_table(record: Mapping[str, Any]) -> Table:
    """Return the shares as a table; with many values, the three commonest of each client."""
    values, clients = record["values"], record["clients"]
    few = len(values) <= 8
    columns = values if few else ["values", "commonest"]
    largest = max(client["train"] for client in clients)
    title = f"{record['kind']} partition by {label(record['column'] or 'row')}"
    table = Table(title=Shown(title, "table.title"), box=None)
    table.padding = (0, 1, 0, 0)
    for column in ("client", "train", "test", "", *columns):
        left = column in ("", "commonest")
        justify: Any = "left" if left else "right"
        table.add_column(Shown(label(column)), justify=justify, no_wrap=column == "")
    for client in clients:
        counts = client["counts"]
        bar = "█" * max(1, round(10 * client["train"] / largest))
        if few:
            cells = [str(counts[value]) if counts[value] else "·" for value in values]
        else:
            top = sorted(counts, key=lambda value: (-counts[value], value))[:3]
            held = sum(1 for value in values if counts[value])
            cells = [str(held), ", ".join(f"{label(value)} {counts[value]}" for value in top)]
        table.add_row(
            str(client["client"]),
            str(client["train"]),
            str(client["held_out"]),
            bar,
            *map(Shown, cells),
        )
    return table


def account_tables(record: Mapping[str, Any]) -> RenderableType:
    """Return all accounts for a terminal: of every source, and of every client."""
    parts: list[RenderableType] = []
    for name, own in row_account.sources(record).items():
        table = Table(title=name, box=None, padding=(0, 2, 0, 0), show_header=False)
        table.add_column(overflow="fold")
        table.add_column(justify="right", no_wrap=True)
        for what, count in row_account.lines(own):
            table.add_row(Shown(what), count)
        parts += [Shown(), table]
    clients = row_account.client_lines(record)
    if clients:
        columns = [key for key in clients[0] if any(row[key] for row in clients)]
        table = Table(title="rows by client", box=None, padding=(0, 2, 0, 0))
        for column in columns:
            table.add_column(column, justify="right")
        for row in clients:
            table.add_row(*(row[column] for column in columns))
        parts += [Shown(), table]
    return Group(*parts)


def round_record(
    record: RoundRecord, headline: PrimaryMetric, title: Callable[[int], str]
) -> dict[str, Any]:
    """Return a round as one line of ``rounds.jsonl``; ``title`` says what a client is called."""
    costs = [cost for cost in record.costs if cost.phase != REPEATED]
    return {
        "round": record.round,
        "clients": list(record.clients),
        "rejected": [
            {"client": client, "name": title(client), "reason": why}
            for client, why in record.rejected.items()
        ],
        "offences": [violation.to_record() for violation in record.offences],
        "replaced": list(record.replaced),
        "absent": [
            {
                "client": client,
                "name": title(client),
                "since": _moment(own.since),
                "reason": own.reason,
            }
            for client, own in sorted(record.absent.items())
        ],
        "paused": {str(client): until for client, until in record.paused.items()},
        "weighed": {str(client): list(claim) for client, claim in record.weighed.items()},
        "learning_rate": record.learning_rate,
        "train": dict(record.train) or None,
        "client_train": {str(c): dict(m) for c, m in record.client_train.items()},
        "evaluation": _evaluation_record(record.evaluation, headline),
        "tokens": trained_tokens(record),
        "bytes_down": sum(cost.bytes_down for cost in costs),
        "bytes_up": sum(cost.bytes_up for cost in costs),
        "flops": sum(cost.flops for cost in costs),
        "seconds": record.seconds,
        "simulated": record.simulated.to_record() if record.simulated is not None else None,
        **({"arrivals": record.arrivals.to_record()} if record.arrivals is not None else {}),
        "details": dict(record.details),
        **({"wire": dict(record.wire)} if record.wire else {}),
    }


def _moment(seconds: float) -> str:
    """Return a time (seconds since 1970) as ISO 8601, in UTC."""
    when = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    return when.isoformat(timespec="seconds")


def totals(costs: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Add up the lines of ``costs.jsonl``: clients' work, and apart the server's and evaluation's."""
    rows = [row for row in costs if row["phase"] != REPEATED]
    judged = [row for row in rows if row["phase"] == EVALUATE]
    work = [row for row in rows if row["phase"] != EVALUATE and row["client"] != SERVER]
    server = [row for row in rows if row["phase"] != EVALUATE and row["client"] == SERVER]

    def total(name: str, of: list[Mapping[str, Any]]) -> float:
        return sum(row[name] or 0 for row in of)

    return {
        **{name: total(name, work) for name in SUMMED},
        "peak_memory": max((row["peak_memory"] for row in rows), default=0),
        "server_flops": total("flops", server),
        "server_seconds": total("seconds", server),
        "evaluation_bytes": total("bytes_up", judged) + total("bytes_down", judged),
        "evaluation_flops": total("flops", judged),
        "evaluation_seconds": total("seconds", judged),
    }


def _evaluation_record(
    evaluation: Evaluation | None, headline: PrimaryMetric
) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    each = {str(client): dict(metrics) for client, metrics in evaluation.clients.items()}
    found = [metrics for metrics in each.values() if headline.name in metrics]
    clients: dict[str, Any] | None = None
    if found:
        values = torch.tensor([metrics[headline.name] for metrics in found], dtype=torch.float64)
        ranked = values.sort(descending=not headline.higher_is_better).values
        decile = ranked[: math.ceil(len(ranked) / 10)]
        clients = {
            "mean": {headline.name: float(values.mean())},
            "worst": {headline.name: float(ranked[0])},
            "worst_decile": {headline.name: float(decile.mean())},
            "spread": {headline.name: float(values.std(correction=0))},
            "fairness": {headline.name: _jain_index(values)},
            "each": each,
        }
    found_rows: dict[str, Any] = {}
    if evaluation.sample is not None:
        own = asdict(sample_interval(evaluation.sample))
        found_rows["interval"] = {key: own[key] for key in ("low", "high", "units", "missing")}
        if evaluation.kept:
            found_rows["rows"] = evaluation.sample.to_record()
    return {"global": dict(evaluation.metrics), **found_rows, "clients": clients}


def unseen_clients_record(
    joined: Mapping[int, Mapping[str, float]], headline: PrimaryMetric
) -> dict[str, Any]:
    """Return the metrics of unseen clients, before and after their own steps."""
    before = [metrics[headline.name] for metrics in joined.values()]
    after = [metrics[AFTER + headline.name] for metrics in joined.values()]
    return {
        "before": {headline.name: sum(before) / len(before)},
        "after": {headline.name: sum(after) / len(after)},
        "each": {str(client): dict(metrics) for client, metrics in joined.items()},
    }


def _jain_index(values: torch.Tensor) -> float:
    """Jain's index (1984), (sum x)^2 / (n sum x^2): 1 where all clients fare alike, 1/n at worst."""
    squares = float(values.square().sum())
    return float(values.sum() ** 2 / (len(values) * squares)) if squares else 1.0


def summary_record(
    rounds: Iterable[Mapping[str, Any]],
    costs: Iterable[Mapping[str, Any]],
    metric: str,
    adapter: Path | None,
    best: int | None = None,
) -> dict[str, Any]:
    """Return the content of ``summary.json``.

    Args:
        rounds: All records of the run's rounds.
        costs: All records of its costs.
        metric: The metric it is judged by.
        adapter: The global adapter's weights, or ``None`` where there is none.
        best: The round whose adapter that is; ``None`` for the last.
    """
    rounds = list(rounds)
    evaluated = [record for record in rounds if record["evaluation"]]
    kept = [record for record in evaluated if best in (None, record["round"])]
    before, after = evaluated[0]["evaluation"], kept[-1]["evaluation"]
    everywhere = all(metric in evaluation["global"] for evaluation in (before, after))
    both = [e["rows"] for e in (before, after) if e.get("rows")]
    gain = change(*map(Sample.from_record, both)) if len(both) == 2 else None
    digest = hashlib.sha256(adapter.read_bytes()).hexdigest() if adapter else None
    return {
        "status": "finished",
        "rounds": rounds[-1]["round"],
        "metric": metric,
        "judged_on": "global" if everywhere else "clients",
        "before": _judged(before, metric, everywhere=everywhere),
        "after": _judged(after, metric, everywhere=everywhere),
        "after_interval": after.get("interval"),
        "change": asdict(gain) if gain else None,
        "before_metrics": before["global"],
        "after_metrics": after["global"],
        "clients_before": before["clients"],
        "clients_after": after["clients"],
        "totals": totals(costs),
        "simulated_seconds": (rounds[-1].get("simulated") or {}).get("end"),
        "adapter": {"path": "adapter", "file": adapter.name, "sha256": digest} if adapter else None,
    }


def _judged(evaluation: Mapping[str, Any], metric: str, *, everywhere: bool) -> float | None:
    """Return a metric on the global held-out set or, where nobody was judged on that, on clients'."""
    of = evaluation["global"] if everywhere else (evaluation["clients"] or {}).get("mean", {})
    value = of.get(metric)  # none where it was not finite
    return None if value is None else float(value)


def tools_of(example: Example) -> Tools:
    """Return what an example's assistant may call."""
    return () if isinstance(example, Labelled) else example.tools


def prompt_of(example: Example) -> Text:
    """Return what a model is asked, empty for labelled text."""
    if isinstance(example, Instruction | Preference | Feedback | Choice):
        return example.prompt
    return ""


def answers_of(example: Example) -> dict[str, Any]:
    """Return the answers that the data itself holds, beside which a model's are shown."""
    group = next(iter(example.columns.values()), None)
    wanted: Text | None = None
    unwanted: Text | None = None
    if isinstance(example, Preference):
        wanted, unwanted = example.chosen, example.rejected
    elif isinstance(example, Instruction):
        wanted = first_answer(example.completion)
    elif isinstance(example, Choice):
        wanted = example.choices[example.right]
    elif isinstance(example, Feedback):
        wanted, unwanted = (
            (example.completion, None) if example.desirable else (None, example.completion)
        )
    return {"wanted": _shown(wanted), "unwanted": _shown(unwanted), "group": group}


def _shown(text: Text | None) -> str | None:
    return None if text is None else plain_text(text).strip()


def summary_text(summary: Mapping[str, Any], headline: PrimaryMetric, folder: Path) -> str:
    """Return what the command line prints at the end."""
    total = summary.get("totals")
    whose = " on clients' own rows (mean)" if summary["judged_on"] == "clients" else ""
    lines = [
        _change(headline.name + whose, summary["before"], summary["after"])
        + _sure(summary.get("change"))
    ]
    if "likelihood_accuracy" in summary["after_metrics"]:
        old, new = (
            summary[when].get("likelihood_accuracy") for when in ("before_metrics", "after_metrics")
        )
        lines.append(_change("likelihood_accuracy", old, new))
    if "best_round" in summary:
        lines.append(summary["best_round"]["text"])
    if total is not None:
        lines.append(
            f"sent {human_bytes(total['bytes_down'])} down, {human_bytes(total['bytes_up'])} up "
            f"(measured); clients computed {human_flops(total['flops'])} (derived) in "
            f"{human_seconds(total['seconds'])}"
        )
    lines += [
        *_simulated(summary.get("simulated_seconds")),
        *([verified_sentence(summary["verified"])] if "verified" in summary else []),
        f"run folder: {folder}",
    ]
    return "\n".join(lines)


def _simulated(seconds: float | None) -> list[str]:
    return [] if seconds is None else [f"simulated time of all rounds: {human_seconds(seconds)}"]


def _sure(gain: Mapping[str, Any] | None) -> str:
    """Return the interval of a change after its line, or why there is none."""
    if gain is None:
        return ""
    if gain["low"] is None:
        return f", {gain['missing']}"
    told = "" if not gain["low"] <= 0 <= gain["high"] else ": no change is shown"
    return f", 95 % over {gain['units']} rows {gain['low']:+.4f} to {gain['high']:+.4f}{told}"


def _change(name: str, before: float | None, after: float | None) -> str:
    shown = ("not measured" if value is None else f"{value:.4f}" for value in (before, after))
    change = "" if before is None or after is None else f"  ({after - before:+.4f})"
    return f"held-out {name} before {next(shown)}  after {next(shown)}{change}"


def verified_sentence(outcome: dict[str, Any]) -> str:
    """Return in one line what a :class:`~fedloom.runs.verification.Verifier` found."""
    if "left_out" in outcome:
        return f"not verified: {outcome['left_out']}"
    count = outcome["folders"]
    what = "what was saved" if count == 1 else f"the {count} models that were saved"
    return (
        f"verified: {what}, loaded by {' and by '.join(outcome['loaded_by'])}, against what was trained, "
        f"on {outcome['rows']} {outcome['rows_are']}: log-probs differ by {outcome['difference']:.1g} "
        f"({outcome['allowed']:.1g} allowed; training moved them by {outcome['moved']:.2g})"
        + (f"; {human_seconds(outcome['seconds'])}" if "seconds" in outcome else "")
    )
