"""One self-contained HTML page from run folders: a run's story, or several compared.

The page needs no network: charts are inline SVG, styles are in the page. What models and data
say is escaped. It reads run folders only; a run that was stopped gives a page that says so.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fedloom.accounting.quantities import human_bytes, human_count, human_flops, human_seconds
from fedloom.reports import compression, row_account
from fedloom.reports.client_rounds import client_costs, server_costs, turns
from fedloom.reports.client_tables import MOST, ClientTable, quantiles
from fedloom.reports.doubts import all_doubts, doubts_of
from fedloom.reports.html import fill, interval, number, write_page
from fedloom.reports.judged import (
    Line,
    band_words,
    counted_interval,
    duplicates,
    global_band,
    outcome,
    over_clients,
    over_rows,
    over_seeds,
    over_units,
    rows_of,
    seeds_line,
    span,
)
from fedloom.reports.run_data import Run, read_run
from fedloom.reports.sections.by_method import drawn
from fedloom.statistics.intervals import Interval
from fedloom.storage.run_folder import Record

SHOWN = 100
"""Answers that were left out which a page lists; of the others it says how many they are."""


def write_report(
    folders: Sequence[Path],
    target: Path | None = None,
    warn: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write one page about one run, or one that compares several.

    Args:
        folders: Run folders; one that is given twice counts once.
        target: File to write (default: report.html in the folder, or comparison.html here).
        warn: Told what counts once though it is there more often, and which figures are doubted.

    Returns:
        The file.

    Raises:
        OutputError: A folder is not a run folder, or the page cannot be written.
    """
    once = list({folder.resolve(): folder for folder in reversed(folders)}.values())[::-1]
    for folder in once:
        times = sum(other.resolve() == folder.resolve() for other in folders)
        if times > 1:
            warn(f"{folder} is given {times} times and counts once")
    runs = [read_run(folder) for folder in once]
    for text in (*counted_once(runs), *all_doubts(runs)):
        warn(text)
    if target is None:
        target = once[0] / "report.html" if len(once) == 1 else Path("comparison.html")
    return write_page(render(runs), target)


def counted_once(runs: Sequence[Run]) -> list[str]:
    """Return a warning for each run that is another one again; over seeds it does not count."""
    return [f"{why}: they count as one run" for why in duplicates(runs).values()]


def render(runs: Sequence[Run]) -> str:
    """Return the page as HTML."""
    return fill(
        "page.html.j2",
        runs=[_view(run) for run in runs],
        comparison=_comparison(runs) if len(runs) > 1 else None,
        doubts=all_doubts(runs) if len(runs) > 1 else (),
        title=runs[0].label if len(runs) == 1 else f"{len(runs)} runs compared",
    )


def _view(run: Run) -> dict[str, Any]:
    """Return what the template shows of one run."""
    rejected = [(r["round"], x) for r in run.rounds for x in r["rejected"]]
    clients = _clients(run)
    return {
        "label": run.label,
        "doubts": doubts_of(run),
        "privacy": run.privacy,
        "run": run.run,
        "settings": _settings(run.experiment),
        "experiment": run.experiment,
        "summary": run.summary,
        "metric": run.metric,
        "figures": _figures(run),
        "clients": clients,
        "spread": _spread(run) if clients is not None and clients.long else [],
        "holdings": _holdings(run),
        "accounts": _accounts(run),
        "resources": _resources(run),
        "by_method": drawn([run]),
        "samples": run.samples,
        "rejected": rejected[:SHOWN],
        "names": _names(run),
        "more_rejected": max(0, len(rejected) - SHOWN),
        "offences": _offences(run),
        "absent": _absent(run),
        "weighed": _weighed(run),
        "done": run.rounds[-1]["round"] if run.rounds else None,
        "outcome": outcome(run),
        "likelihood": _likelihood(run),
        "worst": _worst_client(run),
        "shown": _shown_metrics(run),
    }


def _accounts(run: Run) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return what became of every row of each source; nothing of runs that did not write it down."""
    record = run.run["data"].get("account")
    found = row_account.sources(record) if record else {}
    return [(name, row_account.lines(own)) for name, own in found.items()]


def _offences(run: Run) -> list[Record]:
    """Return one row for each client that has offended: how often, of which kinds, and what followed."""
    rows: dict[int, Record] = {}
    for record in run.rounds:
        for item in record.get("offences", []):
            row = rows.setdefault(
                item["client"], {"client": item["client"], "kinds": {}, "rounds": []}
            )
            kinds = row["kinds"]
            kinds[item["kind"]] = kinds.get(item["kind"], 0) + item["count"]
            row["rounds"] += [record["round"]] if record["round"] not in row["rounds"] else []
            row["reason"] = item["reason"]
    for client, row in rows.items():
        row["paused"] = sum(str(client) in record.get("paused", {}) for record in run.rounds)
    return [rows[client] for client in sorted(rows)]


def _names(run: Run) -> dict[int, str]:
    """Return the member that each client is, in a run between machines."""
    return {own["client"]: own["name"] for own in run.run.get("members", [])}


def _absent(run: Run) -> list[Record]:
    """Return one row for each client and reason that it was missing for: which rounds, since when."""
    names = _names(run)
    rows: dict[tuple[int, str], Record] = {}
    for record in run.rounds:
        for item in record.get("absent", []):
            client, reason = item["client"], item["reason"]
            new = {"name": names.get(client, ""), "rounds": [], "since": item["since"]}
            row = rows.setdefault((client, reason), {"client": client, "reason": reason, **new})
            row["rounds"].append(record["round"])
    return [{**rows[key], "rounds": _ranges(rows[key]["rounds"])} for key in sorted(rows)]


def _ranges(rounds: Sequence[int]) -> str:
    """Return rounds in words: ``1 to 3, 7``."""
    parts: list[list[int]] = []
    for round in rounds:
        if parts and round == parts[-1][-1] + 1:
            parts[-1].append(round)
        else:
            parts.append([round])
    return ", ".join(
        f"{part[0]} to {part[-1]}" if len(part) > 1 else str(part[0]) for part in parts
    )


def _weighed(run: Run) -> dict[str, Record]:
    """Return, for each client that claimed more examples than one may weigh, the last claim."""
    found: dict[str, Record] = {}
    for record in run.rounds:
        for client, (claimed, counted) in record.get("weighed", {}).items():
            rounds = found.get(client, {"rounds": 0})["rounds"] + 1
            found[client] = {"claimed": claimed, "counted": counted, "rounds": rounds}
    return found


def _settings(experiment: str) -> Record:
    import tomllib

    return tomllib.loads(experiment)


def _likelihood(run: Run) -> Record | None:
    """Return how many pairs the model itself finds likelier the right way round, with its interval."""
    name = "likelihood_accuracy"
    _, values = run.global_line(name)
    if not values:
        return None
    after = run.final["evaluation"]["global"].get(name, values[-1])
    interval = counted_interval(name, after, rows_of(run))
    return {"before": values[0], "after": after, "interval": interval}


def _worst_client(run: Run) -> Record | None:
    """Return what the worst client reached, by how many rows, and how the others fare."""
    clients: Record = (run.final["evaluation"]["clients"] if run.evaluated else None) or {}
    each = _each(run.final, run.metric) if clients else {}
    if not each:
        return None
    choose = min if run.run["metric"]["higher_is_better"] else max
    client = choose(each, key=lambda name: each[name])
    rows = int(clients["each"][client].get("examples", 0))
    return {
        "client": client,
        "value": each[client],
        "rows": rows,
        "interval": _client_interval(run, each[client], rows),
        "clients": len(each),
        "mean": clients["mean"][run.metric],
        "worst_decile": clients["worst_decile"][run.metric],
        "spread": clients["spread"][run.metric],
        "over_clients": over_clients(list(each.values()), run.metric),
    }


def _client_interval(run: Run, value: float | None, rows: int) -> Interval | None:
    """Return the interval of a client's share of its own rows; of other metrics there is none."""
    found = None if value is None or not rows else counted_interval(run.metric, value, rows)
    return found if found is not None and found.low is not None else None


def _shown_metrics(run: Run) -> list[str]:
    """Return the names that the page of a run shows, for their definitions."""
    trained = {name for record in run.rounds for name in record["train"] or () if name != "loss"}
    judged = {name for record in run.evaluated for name in record["evaluation"]["global"]}
    costs = ("bytes", "flops", "seconds", "peak_memory", "worst", "spread", "training loss")
    return [run.metric, *judged, *trained, *costs]


def _figures(run: Run) -> list[tuple[str, str]]:
    """Return titled charts; those without data are left out."""
    from fedloom.reports import figures

    name, words = run.metric, run.metric.replace("_", " ")
    charts: list[tuple[str, str]] = []
    lines = {"global held-out set": run.global_line(name)}
    sure = global_band(run)
    own = run.global_line(f"clients_{name}")
    if own[0]:
        lines["clients' models on it"] = own
    band = _client_band(run)
    if band is not None:
        lines["mean of clients"] = (band[0], band[3])
    if run.evaluated:
        chart = figures.line_chart(
            lines,
            "round",
            words,
            band=band[:3] if band else None,
            band_label="worst to best client",
            bands={"global held-out set": sure} if sure[0] else None,
        )
        note = "; its band: 95 % over held-out rows" if sure[0] else ""
        charts.append((f"Held-out {words} by round{note}", chart))
    timed = run.simulated_line(name)
    if timed[0]:
        chart = figures.line_chart({"": timed}, "simulated seconds", words)
        charts.append((f"Held-out {words} by simulated time, derived", chart))
    pairs = run.run["data"]["kind"] == "preference"
    judged = "held-out pairs (DPO loss)" if pairs else "held-out"
    losses = {"training (objective)": run.train_line(), judged: run.global_line("loss")}
    losses = {label: line for label, line in losses.items() if line[0]}
    if losses:
        charts.append(("Loss by round", figures.line_chart(losses, "round", "loss")))
    if run.partition["clients"] and not figures.is_map(run.partition):
        title = f"Who holds what ({run.partition.get('column') or 'rows'})"
        charts.append((title, figures.partition_svg(run.partition)))
    each = [_each(record, name) for record in run.evaluated]
    if each and (after := _each(run.final, name)):
        few = len(after) <= figures.MANY_CLIENTS
        spans = _client_spans(run, after) if few else {}
        chart = figures.before_after_chart(each[0], after, words, spans)
        note = "; band: 95 % over its rows" if any(spans.values()) else ""
        charts.append((f"{words.capitalize()} of each client, before and after{note}", chart))
    if run.costs:
        sent = {"down": run.cost_line("bytes_down", 1e6), "up": run.cost_line("bytes_up", 1e6)}
        charts.append(
            ("Sent so far, measured", figures.line_chart(sent, "round", "MB, all clients"))
        )
        flops = {"": run.cost_line("flops", 1e9)}
        charts.append(
            ("Computed by clients so far, derived", figures.line_chart(flops, "round", "GFLOP"))
        )
    lost = run.train_line("aggregation_error")
    if lost[0]:
        title = "Lost by putting LoRA together: distance to the mean of products, relative"
        charts.append((title, figures.line_chart({"": lost}, "round", "relative error")))
    return charts


def _holdings(run: Run) -> Record | None:
    """Return the map of who holds what and its rows by name, where bars do not name them all."""
    from fedloom.reports import figures

    if not run.partition["clients"] or not figures.is_map(run.partition):
        return None
    rows = []
    for own in run.partition["clients"]:
        held = sorted(own["counts"].items(), key=lambda item: -item[1])
        kept = [(value, count) for value, count in held if count]
        values = ", ".join(f"{value}: {human_count(count)}" for value, count in kept)
        rows.append([str(own["client"]), human_count(sum(own["counts"].values())), values])
    table = ClientTable(["client", "rows", "values, most rows first"], rows, lists=True)
    column = run.partition.get("column") or "rows"
    return {"column": column, "chart": figures.partition_svg(run.partition), "table": table}


def _client_spans(run: Run, after: Record) -> dict[str, tuple[float, float] | None]:
    """Return the ends of the interval of each client's metric after, over its own rows."""
    each = run.final["evaluation"]["clients"]["each"]
    return {
        client: span(_client_interval(run, value, int(each[client].get("examples", 0))))
        for client, value in after.items()
    }


def _each(record: Record, metric: str) -> dict[str, float]:
    clients = record["evaluation"]["clients"]
    each = clients["each"] if clients else {}
    return {client: m[metric] for client, m in each.items() if m.get(metric) is not None}


def _client_band(run: Run) -> tuple[list[float], list[float], list[float], list[float]] | None:
    """Return rounds, lowest, highest and mean of the clients' own metric."""
    found = [(r["round"], list(_each(r, run.metric).values())) for r in run.evaluated]
    found = [(round, values) for round, values in found if values]
    if not found:
        return None
    return (
        [float(round) for round, _ in found],
        [min(values) for _, values in found],
        [max(values) for _, values in found],
        [sum(values) / len(values) for _, values in found],
    )


def _clients(run: Run) -> ClientTable | None:
    """Return one row a client: what it holds, took part in, scored and cost.

    A long table begins with the worst clients, and else with those that took part most often.
    """
    if not run.partition["clients"]:
        return None
    first, last = (run.evaluated[0], run.final) if run.evaluated else (None, None)
    before = _each(first, run.metric) if first else {}
    after = _each(last, run.metric) if last else {}
    rounds, costs = _participations(run), dict[int, list[Record]]()
    for cost in client_costs(run.costs):
        costs.setdefault(cost["client"], []).append(cost)
    rows = []
    shares = run.partition["clients"]
    if len(shares) > MOST:
        sign = 1 if run.run["metric"]["higher_is_better"] else -1
        worst = {int(client): sign * value for client, value in after.items()}
        shares = sorted(
            shares,
            key=lambda own: (worst.get(own["client"], math.inf), -rounds[own["client"]]),
        )
    for share in shares:
        client, reached = share["client"], after.get(str(share["client"]))
        own = costs.get(client, [])
        rows.append(
            [
                str(client),
                human_count(share["train"]),
                human_count(share["held_out"]),
                str(rounds[client]),
                number(before.get(str(client))),
                number(reached),
                interval(_client_interval(run, reached, share["held_out"]), "{:.3f}"),
                human_bytes(sum(c["bytes_down"] + c["bytes_up"] for c in own)),
                human_flops(sum(c["flops"] or 0 for c in own)),
                human_seconds(sum(c["seconds"] or 0 for c in own)),
                human_bytes(max((c["peak_memory"] for c in own), default=0)),
            ]
        )
    words = run.metric.replace("_", " ")
    columns = f"client|training rows|held out|rounds|{words} before|after|95 %, over its rows"
    return ClientTable([*columns.split("|"), "sent", "computed", "time", "peak memory"], rows)


def _participations(run: Run) -> Counter[int]:
    """Return how many rounds each client was drawn for."""
    return Counter(client for record in run.rounds for client in record["clients"])


def _spread(run: Run) -> list[tuple[str, list[float]]]:
    """Return how many clients are spread: least, lower tenth, median, upper tenth and most of each."""
    shares, rounds = run.partition["clients"], _participations(run)
    after = _each(run.final, run.metric) if run.evaluated else {}
    found = {
        "training rows": [share["train"] for share in shares],
        "rounds": [rounds[share["client"]] for share in shares],
        f"{run.metric.replace('_', ' ')} after": list(after.values()),
    }
    return [(what, quantiles(values)) for what, values in found.items() if values]


def _resources(run: Run) -> list[tuple[str, str, str]]:
    """Return (what, how much, measured or derived), for one client in one round and in total."""
    found = turns(run.run, run.costs)
    if not found:
        return []

    def mean(values: Iterable[float]) -> float:
        return sum(values) / len(found)

    work = client_costs(run.costs)
    rows = [
        ("Down, one client, one round", human_bytes(mean(t.sent.down for t in found)), "measured"),
        ("Up, one client, one round", human_bytes(mean(t.sent.up for t in found)), "measured"),
    ]
    expected = [turn.expected for turn in found if turn.expected]
    if expected:
        both = human_bytes(mean(sent.down + sent.up for sent in expected))
        rows.append(("Both by the closed form", both, "derived"))
    rows += [
        ("Compute, one client, one round", human_flops(mean(t.flops for t in found)), "derived"),
        ("Time, one client, one round", human_seconds(mean(t.seconds for t in found)), "measured"),
        ("Peak memory while training", human_bytes(max(t.peak_memory for t in found)), "measured"),
        (
            "Sent in all, without evaluation",
            human_bytes(sum(c["bytes_down"] + c["bytes_up"] for c in work)),
            "measured",
        ),
        ("Computed in all by clients", human_flops(sum(c["flops"] or 0 for c in work)), "derived"),
        ("Tokens trained on", human_count(sum(t.tokens for t in found)), "measured"),
    ]
    if run.run.get("wire"):
        rows += compression.rows(compression.compression_record(run.run, run.costs, run.rounds))
    simulated = [r["simulated"] for r in run.rounds if r.get("simulated")]
    if simulated:
        whole = human_seconds(simulated[-1]["end"])
        rows.append(("Simulated time of all rounds", whole, "derived"))
    server = sum(c["flops"] or 0 for c in server_costs(run.costs))
    if server:
        rows.append(("Computed in all by the server", human_flops(server), "derived"))
    judged = [c for c in run.costs if c["phase"] == "evaluate"]
    if judged:
        sent = sum(c["bytes_down"] + c["bytes_up"] for c in judged)
        rows.append(("Sent for evaluation, in all", human_bytes(sent), "measured"))
    return rows


def _comparison(runs: Sequence[Run]) -> dict[str, Any]:
    """Return table and charts over several runs; only runs of one metric share a chart."""
    from fedloom.reports import figures

    labels = _distinct_labels(runs)
    metric = runs[0].metric
    words = metric.replace("_", " ")
    same = {label: run for label, run in zip(labels, runs, strict=True) if run.metric == metric}
    rows = [_comparison_row(label, run) for label, run in zip(labels, runs, strict=True)]
    curves = {label: run.global_line(metric) for label, run in same.items()}
    bands = {label: band for label, run in same.items() if (band := global_band(run))[0]}
    cost = {
        row["label"]: row
        for row in rows
        if row["label"] in same and row["after"] is not None and row["bytes"] is not None
    }
    charts = [
        (
            f"Held-out {words} by round; bands: 95 % over held-out rows",
            figures.line_chart(curves, "round", words, bands=bands),
        )
    ]
    if cost:
        by_bytes = {label: (row["bytes"] / 1e6, row["after"]) for label, row in cost.items()}
        by_flops = {label: (row["flops"] / 1e9, row["after"]) for label, row in cost.items()}
        spans = {label: span(row["interval"]) for label, row in cost.items()}
        charts.append(
            (
                f"{words.capitalize()} against traffic, 95 % over held-out rows",
                figures.scatter_chart(by_bytes, "MB sent", words, spans),
            )
        )
        charts.append(
            (
                f"{words.capitalize()} against client compute, 95 % over held-out rows",
                figures.scatter_chart(by_flops, "GFLOP (derived)", words, spans),
            )
        )
    return {
        "rows": rows,
        "figures": [*charts, *_mean_curves(list(same.values()), metric)],
        "metric": metric,
        "groups": _groups(runs),
        "notes": counted_once(runs),
        "shown": list(dict.fromkeys(run.metric for run in runs)),
    }


def _comparison_row(label: str, run: Run) -> Record:
    reached = outcome(run)
    settings = _settings(run.experiment)
    work = client_costs(run.costs)
    clients = (run.summary or {}).get("clients_after")
    return {
        "label": label,
        "method": settings["method"]["name"],
        "objective": settings["objective"]["name"],
        "seed": run.run["seed"],
        "before": reached.before if reached else None,
        "after": reached.after if reached else None,
        "held_out": reached.rows if reached else None,
        "interval": reached.interval if reached else None,
        "worst": clients["worst"][run.metric] if clients else None,
        **(dict.fromkeys(_SPENT) if run.is_withheld else _spent(work)),
        "finished": run.summary is not None,
    }


_SPENT = ("bytes", "flops", "seconds", "memory")


def _spent(work: Sequence[Record]) -> dict[str, float]:
    """Return what clients' work took in all, by :data:`_SPENT`."""
    return {
        "bytes": sum(c["bytes_down"] + c["bytes_up"] for c in work),
        "flops": sum(c["flops"] or 0 for c in work),
        "seconds": sum(c["seconds"] or 0 for c in work),
        "memory": max((c["peak_memory"] for c in work), default=0),
    }


def _by_seed(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    """Return a name and the runs of each set that differ in their seed alone, one made twice once."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        settings = _settings(run.experiment)
        settings.pop("name", None)
        settings.pop("output", None)
        settings["federation"].pop("seed", None)
        groups.setdefault(repr(settings), []).append(run)
    found = []
    for members in groups.values():
        again = duplicates(members)
        own = _settings(members[0].experiment)
        name = f"{own['objective']['name']} by {own['method']['name']}"
        found.append((name, [run for place, run in enumerate(members) if place not in again]))
    return found


def _mean_curves(runs: Sequence[Run], metric: str) -> list[tuple[str, str]]:
    """Return charts of the metric and both losses, a line with a band for runs of several seeds."""
    from fedloom.reports import figures

    kinds: list[tuple[str, str, Callable[[Run], Line]]] = [
        ("held-out", metric, lambda run: run.global_line(metric)),
        ("held-out", "loss", lambda run: run.global_line("loss")),
        ("training", "loss", lambda run: run.train_line()),
    ]
    charts = []
    for which, name, line_of in kinds[metric == "loss" :]:
        lines, bands, counts = {}, {}, []
        over = partial(over_units, over="seeds", metric=name)
        for group, members in _by_seed(runs):
            found = [line for run in members if (line := line_of(run))[0]]
            if len(found) > 1:
                lines[group], bands[group] = seeds_line(found, over)
                counts.append(len(found))
        if lines:
            words = f"{which} {name.replace('_', ' ')}"
            chart = figures.line_chart(lines, "round", words, bands=bands)
            caption = f"{words.capitalize()} by round, mean over seeds; {band_words(counts)}"
            charts.append((caption, chart))
    return charts


def _groups(runs: Sequence[Run]) -> list[Record]:
    """Return mean and intervals of runs that differ in their seed alone; one made twice counts once."""
    rows = []
    for name, members in _by_seed(runs):
        found = [(run, reached.after) for run in members if (reached := outcome(run)) is not None]
        if len(found) > 1:
            kept, values = [run for run, _ in found], [value for _, value in found]
            sure = over_seeds(values, kept[0])
            rows.append(
                {
                    "name": name,
                    "runs": len(values),
                    "mean": sure.estimate,
                    "models": over_rows(kept, values),
                    "method": sure,
                }
            )
    return rows


def _distinct_labels(runs: Sequence[Run]) -> list[str]:
    seen: dict[str, int] = {}
    labels = []
    for run in runs:
        seen[run.label] = seen.get(run.label, 0) + 1
        labels.append(run.label if seen[run.label] == 1 else f"{run.label} ({seen[run.label]})")
    return labels
