"""Privacy of rows: each client's own steps hide its rows, with an epsilon; what that costs.

python examples/row_privacy.py
"""

import json

import fedloom

experiment = {
    "data": {"source": "builtin:preferences", "builtin_rows": 2000},
    "partition": {"kind": "iid", "client_test_fraction": 0.0},
    "federation": {"clients": 2, "rounds": 4},
    "training": {"batch_size": 64, "local_steps": 8, "learning_rate": 3e-3},
    "evaluation": {"every": 4, "per_client": False, "samples": 0},
}

accuracy, said = {}, {}
for name, privacy in [
    ("no noise", {}),
    ("epsilon 8", {"unit": "row", "delta": 1e-4, "target_epsilon": 8.0, "clip": 0.5}),
]:
    result = fedloom.run(experiment, privacy=privacy)
    accuracy[name] = result.metrics["preference_accuracy"]
    said[name] = json.loads((result.folder / "summary.json").read_text()).get("privacy")
    print(f"{name}: accuracy {accuracy[name]:.3f}")

# Who learns what, and what is not protected; the page of the run begins with it.
print("\n".join(said["epsilon 8"]["sentences"]))
