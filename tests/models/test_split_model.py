"""A model cut in two or three equals the whole one: activations, loss and every gradient of the adapter."""

import subprocess
import sys
import textwrap

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from fedloom.data.batch import Batch, Sequences
from fedloom.errors import ModelError
from fedloom.models.adapters import AdapterModel, AdapterSettings, attach_adapter
from fedloom.models.load import load_backbone
from fedloom.models.split_model import ClientPart, ServerPart, check_split_point, last_tokens
from fedloom.objectives import SFT, Classification

SIZE = {"vocab_size": 64, "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4}
LLAMA_LIKE = {**SIZE, "intermediate_size": 40, "num_key_value_heads": 2, "head_dim": 6}
CONFIGS = {
    "llama": LlamaConfig(**LLAMA_LIKE),
    "gpt2": GPT2Config(
        vocab_size=64,
        n_embd=24,
        n_layer=4,
        n_head=4,
        n_positions=64,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    ),
    "qwen2": Qwen2Config(
        **LLAMA_LIKE, use_sliding_window=True, sliding_window=4, max_window_layers=2
    ),
    "qwen3": Qwen3Config(**LLAMA_LIKE),
}
PAD = 0
CLASSES = ("a", "b", "c")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("architectures")
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
    return root


def built(folder, classes, blocks=None):
    backbone = load_backbone(str(folder), classes=classes, pad_token_id=PAD, blocks=blocks)
    return attach_adapter(backbone, AdapterSettings(rank=3), classification=bool(classes))


def batch(classes):
    ids = torch.randint(1, 64, (5, 11), generator=torch.Generator().manual_seed(3))
    lengths = torch.tensor([11, 7, 9, 4, 11])
    mask = torch.arange(11) < lengths[:, None]
    ids[~mask] = PAD
    completion = mask & (torch.arange(11) >= 3)
    sequences = Sequences(ids, mask.long(), completion, 3)
    labels = torch.tensor([0, 2, 1, 1, 0]) if classes else None
    return Batch(tuple(range(5)), sequences, int(completion.sum()), int(mask.sum()), labels)


@pytest.mark.parametrize("tail", [False, True], ids=["labels at the server", "U-shape"])
@pytest.mark.parametrize("classes", [(), CLASSES], ids=["sft", "classification"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_cut_gives_the_whole_models_loss_and_gradients(folders, name, classes, tail):
    objective = Classification() if classes else SFT()
    own = batch(classes)
    whole = AdapterModel(built(folders / name, classes), PAD)
    generator = torch.Generator().manual_seed(1)
    adapter = {n: 0.1 * torch.randn(t.shape, generator=generator) for n, t in whole.read().items()}
    whole.write(adapter)
    loss, _ = objective.loss(whole, own, None)
    loss.backward()
    wanted = {name: p.grad.clone() for name, p in whole.parameters.items()}
    count = whole.model.config.num_hidden_layers
    for cut in range(1, count):
        front = ClientPart(built(folders / name, classes, cut), PAD, tail=tail)
        front.write(adapter)
        for parameter in whole.parameters.values():
            parameter.grad = None
        back = ServerPart(whole, cut, tail=tail)
        assert set(front.parameters).isdisjoint(back.parameters)
        assert set(front.parameters) | set(back.parameters) == set(whole.parameters)
        mask = own.sequences.attention_mask
        sent = front(input_ids=own.sequences.input_ids, attention_mask=mask)
        entered = sent.detach().requires_grad_()
        hidden = back(input_ids=entered, attention_mask=mask)
        ending = front.ending if tail else back.ending
        left = hidden.detach().requires_grad_() if tail else hidden
        ending.hidden = left
        ending.last = last_tokens(own.sequences.input_ids, PAD) if classes else None
        found, _ = objective.loss(ending, own, None)
        found.backward()
        if tail:
            hidden.backward(left.grad)
        sent.backward(entered.grad)
        assert float(found.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
        for half in (front, back):
            for key, parameter in half.parameters.items():
                error = (parameter.grad - wanted[key]).norm() / wanted[key].norm()
                assert error < 1e-5, (cut, key, float(error))


@pytest.mark.parametrize("cut", [0, 4, 7])
def test_a_cut_outside_the_blocks_is_named(cut):
    with pytest.raises(ModelError, match=rf"method.cut = {cut}: this model has 4 blocks.*1 to 3"):
        check_split_point(CONFIGS["llama"], cut)


def test_an_architecture_that_is_not_known_is_named():
    with pytest.raises(
        ModelError,
        match=r"a 'gemma' model cannot be cut in two.*: known are gpt2, llama",
    ):
        check_split_point(GemmaConfig(), 1)


def test_a_front_half_that_holds_no_head_cannot_train_one(folders):
    front = ClientPart(built(folders / "llama", CLASSES, 2), PAD, tail=False)
    assert not any("score" in name for name in front.parameters)
    assert front.ending is None


@pytest.mark.slow
def test_a_client_never_loads_the_servers_blocks(model_folder, tmp_path):
    """Peak memory of a process that loads and runs one block of twelve, beside one that has them all."""
    config = LlamaConfig(
        **{**SIZE, "vocab_size": 256, "hidden_size": 384, "num_hidden_layers": 12},
        intermediate_size=1536,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    script = """
        import re, sys
        from pathlib import Path
        import torch
        from fedloom.models.load import load_backbone
        def peak(folder, blocks):
            ids = torch.ones(1, 4, dtype=torch.long)
            load_backbone(folder, pad_token_id=0, blocks=blocks)(input_ids=ids)
            return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
        torch.set_num_threads(1)
        before = peak(sys.argv[2], None)  # everything that any model needs once
        print(peak(sys.argv[1], int(sys.argv[3]) or None) - before)
    """

    def grown(blocks):
        command = [sys.executable, "-c", textwrap.dedent(script), tmp_path, model_folder, blocks]
        done = subprocess.run(map(str, command), capture_output=True, text=True, check=True)
        return int(done.stdout.split()[-1])

    weights = (tmp_path / "model.safetensors").stat().st_size
    assert grown(0) > 0.8 * weights
    assert grown(1) < 0.2 * weights
