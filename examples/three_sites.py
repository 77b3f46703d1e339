"""My rows, three sites: every JSONL file is a client, and no row leaves its file's client.

python examples/three_sites.py
"""

import json
from pathlib import Path

import fedloom

# Your own files go here: a JSON object a line, with a prompt and a completion.
folder = Path("three_sites")
folder.mkdir(exist_ok=True)
sites = ["north", "south", "east"]
for name, first in [("north", 0), ("south", 40), ("east", 80), ("held_out", 120)]:
    with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        for number in range(first, first + 40):
            row = {"prompt": f"Where is box {number}?", "completion": f" Box {number} is here."}
            file.write(json.dumps(row) + "\n")

result = fedloom.run(
    {
        "model": {"path": "tiny"},  # or a folder, or a name on the Hugging Face Hub
        "data": {
            "source": [str(folder / f"{site}.jsonl") for site in sites],
            "kind": "instruction",
            "test_source": str(folder / "held_out.jsonl"),  # the server's own: it judges each round
        },
        "partition": {"kind": "files"},  # the first file is client 0, the second client 1, ...
        "objective": {"name": "sft"},
        "federation": {"clients": len(sites), "rounds": 3},
        "training": {"learning_rate": 3e-3},
    }
)
print(f"loss on held-out rows: {result.metrics_before['loss']:.2f} -> {result.metrics['loss']:.2f}")
print(f"adapter: {result.adapter_path}")
