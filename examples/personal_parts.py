"""FedPDPO: clients who want the opposite share a LoRA; head and bottleneck stay with each.

python examples/personal_parts.py
"""

import fedloom

experiment = {
    # Half of the clients prefer what the other half rejects; the column "side" says who.
    "data": {"source": "builtin:opposed", "builtin_rows": 400},
    "partition": {"kind": "column", "column": "side", "client_test_fraction": 0.3},
    "federation": {"clients": 2, "rounds": 4},
    "training": {"learning_rate": 3e-3},
    "evaluation": {"every": 4, "samples": 0},
}

judged = {}  # by method, the accuracy of each client on its own held-out rows, by its own model


def keep(round, evaluation):
    """Called with each evaluation; the last one is kept."""
    judged[method] = {
        client: metrics["preference_accuracy"] for client, metrics in evaluation.clients.items()
    }


folders = {}
for method, objective in [("fedavg", "dpo"), ("fedpdpo", "pdpo")]:
    result = fedloom.run(
        experiment,
        method={"name": method},
        objective={"name": objective},
        on_evaluation=keep,
    )
    folders[method] = result.folder
    print(f"{method}: " + ", ".join(f"client {c} {own:.3f}" for c, own in judged[method].items()))
    print(f"  sent by clients: {result.costs['bytes_up'] / 1e6:.2f} MB")

# Each client's own parts are here in a simulation; between machines they never leave the client.
print(sorted(path.name for path in (folders["fedpdpo"] / "clients" / "0000").iterdir()))
