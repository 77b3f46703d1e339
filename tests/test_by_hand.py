"""The one-page FedAvg without our classes gives the adapter that the package gives."""

import importlib.util
from pathlib import Path

import torch
from safetensors.torch import load_file

import fedloom
from fedloom.runs.partitioning import partition_data


def test_the_package_equals_the_page(experiment):
    built = experiment(
        objective={"name": "sft"}, data={"source": "builtin:instructions"}, adapter={"rank": 4}
    )
    path = Path(__file__).parents[1] / "examples" / "fedavg_by_hand.py"
    spec = importlib.util.spec_from_file_location("fedavg_by_hand", path)
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    clients = [
        [(e.prompt, e.completion) for e in rows] for rows in partition_data(built).train.values()
    ]
    by_hand = page.fedavg(
        built.model.path, clients, rounds=2, rank=4, learning_rate=1e-3, batch_size=8
    )
    result = fedloom.run(built)
    ours = load_file(result.adapter_path / "adapter_model.safetensors")
    assert len(ours) == len(by_hand) == 28
    moved = 0.0
    for name, tensor in by_hand.items():
        torch.testing.assert_close(ours[name.replace(".default", "")], tensor, rtol=0, atol=2e-5)
        moved = max(moved, float(tensor.abs().max()) if "lora_B" in name else 0.0)
    assert moved > 1e-3  # B starts at zero: the tolerance is far below what was learnt
