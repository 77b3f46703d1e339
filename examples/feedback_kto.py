"""Single answers with thumbs up or down, by KTO: as collected, and unrolled from pairs.

    python examples/feedback_kto.py

A pair gives one desirable and one undesirable answer. They stay with the client that has the pair
(partition.feedback = "together"), or are dealt over all clients ("spread"), as if nobody had seen both.
"""

import fedloom

base = {
    "objective": {"name": "kto", "beta": 0.2, "weights": "balanced"},
    "partition": {"kind": "iid"},
    "federation": {"clients": 4, "rounds": 3},
    "training": {"learning_rate": 3e-3},
    "evaluation": {"per_client": False, "samples": 0},
}
thumbs = {"source": "builtin:feedback", "builtin_rows": 400}  # columns prompt, completion, label
pairs = {"source": "builtin:preferences", "builtin_rows": 400}

results = {
    "single answers": fedloom.run(base, data=thumbs),
    "pairs, together": fedloom.run(base, data=pairs, feedback="together"),
    "pairs, spread": fedloom.run(base, data=pairs, feedback="spread"),
}
for name, result in results.items():
    # Single held-out answers are judged by the area under the ROC curve, pairs by who wins.
    metric = "feedback_auc" if name == "single answers" else "preference_accuracy"
    print(f"{name}: {metric} {result.metrics_before[metric]:.3f} -> {result.metrics[metric]:.3f}")
