"""How examples become tokens, beside what ``tests/oracles/test_chat.py`` compares with TRL."""

import pytest

from fedloom.data.encode import TextEncoder
from fedloom.data.examples import Instruction
from fedloom.data.tokenize import tokenize
from fedloom.evaluation.generate import Ask, generate, load_encoder
from fedloom.models.load import load_backbone, load_tokenizer, stop_tokens


@pytest.fixture
def copy(model_folder, tmp_path):
    """Copy the small model and give it other ends of an answer."""
    import json
    import shutil

    def make(ends):
        folder = tmp_path / "model"
        shutil.copytree(model_folder, folder)
        file = folder / "generation_config.json"
        whole = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps(whole | {"eos_token_id": ends}))
        return folder

    return make


def test_generation_stops_at_every_end_token_of_the_model(copy, monkeypatch):
    folder = copy([2, 40, 41])
    assert stop_tokens(str(folder)) == (2, 40, 41)
    encoder = load_encoder(str(folder))
    assert encoder.stop_ids == (2, 40, 41)
    model = load_backbone(str(folder), pad_token_id=0).eval()
    told = []
    monkeypatch.setattr(
        type(model),
        "generate",
        lambda self, **words: told.append(words) or words["input_ids"].repeat(1, 2),
    )
    generate(model, encoder, [Ask((1, 50, 41, 51))], 4)
    assert told[-1]["eos_token_id"] == [
        2,
        40,
        41,
    ]  # before, whether a cache changes answers is tried


def test_an_answer_is_what_was_written_before_the_first_end(copy, monkeypatch):
    import torch

    encoder = load_encoder(str(copy([2, 40])))
    model = load_backbone(encoder.tokenizer.name_or_path, pad_token_id=0).eval()
    words = encoder.tokenizer(" it is", add_special_tokens=False)["input_ids"]
    written = torch.tensor([[1, *words, 40, *words, 2]])
    monkeypatch.setattr(type(model), "generate", lambda self, **_: written)
    assert generate(model, encoder, [Ask((1,))], 9) == ["it is"]


def test_an_answer_that_ends_at_one_of_them_gets_no_other_end(copy):
    folder = copy([2, 40])
    tokenizer = load_tokenizer(str(folder))
    end = tokenizer.decode([40])
    row = Instruction(0, "Q:", "a" + end)
    assert tokenize([row], TextEncoder(tokenizer, (2, 40)), 64).tokens[-1] == 40
    assert tokenize([row], TextEncoder(tokenizer), 64).tokens[-2:].tolist() == [40, 2]


def test_a_tokenizer_without_offsets(model_folder):
    """Slow tokenizers do not say which characters a token stands for."""
    fast = load_encoder(str(model_folder))

    class Slow:
        is_fast = False

        def __getattr__(self, name):
            return getattr(fast.tokenizer, name)

        def __call__(self, texts, *, return_offsets_mapping=False, **words):
            assert not return_offsets_mapping
            return fast.tokenizer(texts, **words)

        def __len__(self):
            return len(fast.tokenizer)

    rows = [
        Instruction(0, ({"role": "user", "content": "hi"},), ({"role": "assistant", "content": "hello you"},)),
        Instruction(1, "What is it", " called?"),
    ]  # fmt: skip
    expected, found = tokenize(rows, fast, 64), tokenize(rows, TextEncoder(Slow()), 64)
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert found.trained.tolist() == expected.trained.tolist()
