"""The tiny model: made once, the same bytes each time, able to write any text."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from fedloom.data.builtin import pretraining_texts
from fedloom.models.load import load_tokenizer
from fedloom.models.tiny import TinyRecipe, make_tiny_model, tiny_model

RECIPE = TinyRecipe(vocabulary=300, hidden=16, intermediate=32, layers=1, heads=2, steps=3)
TEXTS = pretraining_texts(np.random.default_rng(0), 50)


def digest(folder):
    files = ("model.safetensors", "tokenizer.json", "config.json")
    return [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in files]


def test_made_once_and_found_again(tmp_path):
    folder = tiny_model(tmp_path, TEXTS, RECIPE)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert tiny_model(tmp_path, TEXTS, RECIPE) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert tiny_model(tmp_path, TEXTS[1:], RECIPE) != folder
    assert not list(tmp_path.glob(".tiny-*"))


@pytest.mark.slow
def test_same_bytes_in_another_process(tmp_path):
    make_tiny_model(tmp_path / "a", TEXTS, RECIPE)
    code = (
        "import sys, numpy as np; from pathlib import Path;"
        "from fedloom.data.builtin import pretraining_texts;"
        "from fedloom.models.tiny import TinyRecipe, make_tiny_model;"
        f"make_tiny_model(Path(sys.argv[1]), pretraining_texts(np.random.default_rng(0), 50), {RECIPE!r})"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "b")], check=True, capture_output=True
    )
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


@pytest.mark.parametrize("text", ["Guten Tag, schöne Grüße!", "日本語", "a\n\tb  c", "🙂"])
def test_any_text_can_be_written(model_folder, text):
    tokenizer = load_tokenizer(str(model_folder))
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
