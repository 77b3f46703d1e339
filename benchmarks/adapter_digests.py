"""Print the SHA-256 of what small runs leave: one line an experiment, methods with objectives.

``PYTHONPATH=src:tests python benchmarks/adapter_digests.py > FILE``, before and after a change that may
move no bit, and compare the two files. A minute on one core.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

EXPERIMENTS: dict[str, dict[str, Any]] = {
    "fedavg-dpo": {},
    "fedavg-kto-seed": {"objective": {"name": "kto"}, "federation": {"seed": 7}},
    "fedprox-ipo": {"method": {"name": "fedprox"}, "objective": {"name": "ipo"}},
    "scaffold-simpo": {"method": {"name": "scaffold"}, "objective": {"name": "simpo"}},
    "fedadam-orpo": {"method": {"name": "fedadam"}, "objective": {"name": "orpo"}},
    "median-dpo": {"aggregation": {"rule": "median"}},
    "fedpdpo-pdpo": {"method": {"name": "fedpdpo"}, "objective": {"name": "pdpo"}},
    "fedrep-dpo": {"method": {"name": "fedrep"}},
    "ditto-dpo": {"method": {"name": "ditto"}},
    "feddpa-dpo": {"method": {"name": "feddpa"}},
    "fdlora-dpo": {"method": {"name": "fdlora"}},
    "ffa_lora-dpo": {"method": {"name": "ffa_lora"}},
    "hetlora-ranks": {
        "method": {"name": "hetlora"},
        "clients": {"groups": {"low": {"clients": [1], "rank": 1}}},
    },
    "flora-dpo": {"method": {"name": "flora"}},
    "fedex_lora-dpo": {"method": {"name": "fedex_lora"}},
    "fedamole-dpo": {
        "adapter": {"kind": "experts", "rank": 2, "experts": 6},
        "method": {"name": "fedamole", "max_experts_per_client": 6, "min_experts_per_client": 1},
        "partition": {"kind": "column", "column": "domain"},
    },
    "distillation-sft": {
        "data": {"source": "builtin:instructions", "builtin_rows": 60},
        "objective": {"name": "sft"},
        "public": {"rows": 12},
        "method": {
            "name": "distillation",
            "server_epochs": 1,
            "client_epochs": 1,
            "server_rank": 3,
        },
    },
    "distillation-classification": {
        "data": {"source": "builtin:labelled", "builtin_rows": 100},
        "objective": {"name": "classification"},
        "public": {"rows": 12},
        "method": {"name": "distillation", "server_epochs": 1, "client_epochs": 1, "top_k": 2},
    },
    "split-sft": {
        "data": {"source": "builtin:instructions", "builtin_rows": 60},
        "objective": {"name": "sft"},
        "method": {"name": "split"},
    },
    "split-classification-client": {
        "data": {"source": "builtin:labelled", "builtin_rows": 100},
        "objective": {"name": "classification"},
        "method": {"name": "split", "labels": "client", "server": "parallel"},
    },
    "centralised-dpo": {"method": {"name": "centralised"}},
    "local_only-dpo": {"method": {"name": "local_only"}},
    "fedmoe-dpo": {
        "adapter": {"kind": "submixture"},
        "method": {"name": "fedmoe", "experts_per_client": 3},
    },
    "fedavg-newcomer": {"clients": {"newcomers": [2], "newcomer_steps": 2}},
}
BASE: dict[str, dict[str, Any]] = {
    "adapter": {"rank": 2},
    "data": {"source": "builtin:preferences", "builtin_rows": 60},
    "federation": {"rounds": 2, "clients": 3},
    "training": {"learning_rate": 1e-2, "batch_size": 8},
    "evaluation": {"samples": 1, "max_new_tokens": 2},
}


def models(folder: Path) -> dict[str, str]:
    """Return the folders of two random models: one of linear layers, one with experts."""
    from conftest import make_mixture
    from fedloom.data.builtin import pretraining_texts
    from fedloom.models.tiny import TinyRecipe, make_tiny_model

    plain, mixture = folder / "plain", folder / "mixture"
    recipe = TinyRecipe(vocabulary=320, hidden=32, intermediate=64, layers=2, heads=2, steps=2)
    make_tiny_model(plain, pretraining_texts(np.random.default_rng(0), 200), recipe)
    make_mixture(mixture, plain)
    return {"plain": str(plain), "mixture": str(mixture)}


def experiment_of(name: str, folder: Path, paths: dict[str, str]) -> dict[str, Any]:
    """Return the table of an experiment, which leaves its run in ``folder``."""
    own = EXPERIMENTS[name]
    path = paths["mixture" if own.get("adapter", {}).get("kind") == "submixture" else "plain"]
    table = {
        section: {**BASE.get(section, {}), **own.get(section, {})} for section in {**BASE, **own}
    }
    if "kind" in own.get("adapter", {}):
        table["adapter"] = own["adapter"]
    return {
        **table,
        "model": {"path": path},
        "output": {"folder": str(folder), "verify": False},
    }


def digest_of(folder: Path) -> str:
    """Return one SHA-256 over the tensors of all that a run leaves, and its held-out figures."""
    from safetensors.torch import load_file

    found = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        found.update(file.relative_to(folder).as_posix().encode())
        for name, tensor in sorted(load_file(file).items()):
            found.update(name.encode())
            found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    for line in (folder / "rounds.jsonl").read_text(encoding="utf-8").splitlines():
        found.update(json.dumps(json.loads(line).get("held_out"), sort_keys=True).encode())
    return found.hexdigest()


def main() -> None:
    """Run every experiment, and print its digest."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        os.environ["FEDLOOM_CACHE"] = str(Path(place) / "cache")
        import fedloom

        paths = models(Path(place))
        for name in EXPERIMENTS:
            folder = Path(place) / name
            table = experiment_of(name, folder, paths)
            fedloom.run(fedloom.Experiment.from_table(table, name=name))
            print(f"{digest_of(folder)}  {name}", flush=True)


if __name__ == "__main__":
    main()
