"""What travels: adapters, logits on public rows, or activations; bytes read from the costs.

    python examples/communication.py

So few rounds say nothing of quality: recipes/frameworks_builtin.toml weighs it against the bytes.
"""

import fedloom

experiment = {
    "data": {"source": "builtin:labelled", "builtin_rows": 300},
    "objective": {"name": "classification"},
    "federation": {"clients": 3, "rounds": 2},
    "training": {"learning_rate": 1e-2},
    "evaluation": {"per_client": False, "every": 2},  # so that all train on the same rows
}
differences = {
    "adapters": {"method": {"name": "fedavg"}},
    "logits": {
        "method": {"name": "distillation", "encoding": "fp16"},
        "public": {"rows": 60},  # rows that all parties have
    },
    "activations": {"method": {"name": "split", "cut": 1}},  # one block at the client
}
costs = {}
print("travels       kB up  kB down  messages  client GFLOP")
for name, sections in differences.items():
    costs[name] = own = fedloom.run(experiment, **sections).costs
    print(
        f"{name:<11} {own['bytes_up'] / 1e3:7.0f}  {own['bytes_down'] / 1e3:7.0f}  "
        f"{own['exchanges']:8.0f}  {own['flops'] / 1e9:12.1f}"
    )
