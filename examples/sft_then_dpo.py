"""Fine-tuning on instructions first, then alignment on preferences from the adapter that it left.

python examples/sft_then_dpo.py
"""

import fedloom

base = {
    "federation": {"clients": 4, "rounds": 3},
    "training": {"learning_rate": 3e-3},
}
sft = fedloom.run(
    base,
    data={"source": "builtin:instructions", "builtin_rows": 400},
    objective={"name": "sft"},
)
dpo = fedloom.run(
    base,
    data={"source": "builtin:preferences", "builtin_rows": 400},
    objective={"name": "dpo"},  # its reference model is what it starts from
    adapter={"start": str(sft.folder)},
)
print(f"SFT loss: {sft.metrics_before['loss']:.3f} -> {sft.metrics['loss']:.3f}")
before, after = (m["preference_accuracy"] for m in (dpo.metrics_before, dpo.metrics))
print(f"DPO preference accuracy: {before:.3f} -> {after:.3f}")
