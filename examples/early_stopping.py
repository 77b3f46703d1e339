"""Callbacks: stop when the held-out loss rises, and go on later.

python examples/early_stopping.py
"""

import tempfile

import fedloom


class Enough(Exception):
    """Raised by a callback: ends the run, whose rounds are saved."""


losses = []


def watch(round, evaluation):
    """Called with each evaluation; round 0 is that of the start."""
    losses.append(evaluation.metrics["loss"])
    print(f"round {round}: held-out loss {losses[-1]:.4f}")
    if losses[-1] > min(losses):
        raise Enough


folder = tempfile.mkdtemp()
try:
    fedloom.run(
        {
            "data": {"source": "builtin:preferences", "builtin_rows": 200},
            "objective": {"name": "dpo"},
            "federation": {"clients": 3, "rounds": 6},
            "training": {"learning_rate": 3e-2},  # so high that the loss soon rises
            "output": {"folder": folder},
        },
        on_evaluation=watch,
    )
except Enough:
    print(f"stopped after round {len(losses) - 1}")

# Later, or after a crash: the rounds that are left, and the same bytes as without the interruption.
played = []
result = fedloom.resume(folder, on_round=lambda record: played.append(record.round))
print(f"resumed, and played rounds {played}; adapter: {result.adapter_path}")
