"""Records of a run as a run writes them, made by hand, for what reads them as they grow."""

from fedloom.storage.run_folder import RunFolder

COST = {
    **dict.fromkeys(("flops", "seconds", "peak_memory", "tokens", "targets", "examples"), 0),
    **{"steps": 1, "exchanges": 1, "bytes_down": 100, "bytes_up": 10, "phase": "train"},
}


def begin(path, clients=3, rounds=10, members=(), metric="accuracy"):
    """A folder in which a run has begun."""
    path.mkdir(parents=True)
    folder = RunFolder(path)
    folder.write_text("experiment.toml", f"[federation]\nrounds = {rounds}\nclients = {clients}\n")
    shares = [{"client": own, "train": 4, "held_out": 2, "counts": {}} for own in range(clients)]
    folder.write_json("partition.json", {"clients": shares, "values": []})
    folder.write_json(
        "run.json",
        {
            "metric": {"name": metric, "help": "share of rows", "higher_is_better": True},
            "model": {"name": "tiny"},
            "members": list(members),
        },
    )
    return folder


def record(number, each, **changes):
    """One line of rounds.jsonl: clients with their accuracy, whose loss is 1 less that."""
    metrics = {str(client): {"accuracy": value, "examples": 2} for client, value in each.items()}
    mean = sum(each.values()) / len(each) if each else None
    of_clients = {"mean": {"accuracy": mean}, "worst_decile": {"accuracy": min(each.values())}}
    return {
        "round": number,
        "clients": sorted(each) if number else [],
        **{name: [] for name in ("rejected", "offences", "replaced", "absent")},
        **{"paused": {}, "weighed": {}, "details": {}, "simulated": None},
        "train": {"loss": 1.0 - mean} if number else None,
        "client_train": {
            c: {"loss": 1.0 - own["accuracy"]} for c, own in metrics.items() if number
        },
        "evaluation": {
            "global": {"accuracy": mean, "loss": 2.0 - mean},
            "interval": {"low": mean - 0.1, "high": mean + 0.1, "units": 9, "missing": ""},
            "clients": {**of_clients, "each": metrics},
        },
        **{"tokens": 9, "flops": 1.0, "bytes_down": 100 * len(each), "bytes_up": 10 * len(each)},
        "seconds": 2.0,
        **changes,
    }


def append(folder, number, each, **changes):
    """Write a round as a run does: costs first."""
    drawn = [{**COST, "round": number, "client": client} for client in each]
    folder.append("costs.jsonl", drawn if number else [])
    folder.append("rounds.jsonl", [record(number, each, **changes)])
