"""Log-probs under the reference model: found again bit for bit, or not at all."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedloom.data.builtin import builtin_examples
from fedloom.data.client_rows import TokenShare
from fedloom.data.tokenize import tokenize
from fedloom.evaluation.generate import load_encoder
from fedloom.models.adapters import AdapterModel, AdapterSettings, attach_adapter
from fedloom.models.load import load_backbone
from fedloom.training.layout import Budget
from fedloom.training.reference_cache import ReferenceCache, _entries
from fedloom.training.references import add_reference_logps
from fedloom.training.shared_prompts import shares_prompts

BUDGET = Budget(4, 400)


@pytest.fixture
def share(model_folder):
    examples = builtin_examples("preferences", 10, np.random.default_rng(0))
    return TokenShare(tokenize(examples, load_encoder(str(model_folder)), 96))


@pytest.fixture
def model(model_folder):
    backbone = load_backbone(str(model_folder), pad_token_id=0)
    own = AdapterModel(attach_adapter(backbone, AdapterSettings(rank=2)), 0)
    assert shares_prompts(own, 0)  # which takes passes of its own
    return own


@pytest.fixture
def passes(monkeypatch):
    """Count the forward passes of any model."""
    made = []
    real = AdapterModel._run

    def run(self, *args, **options):
        made.append(1)
        return real(self, *args, **options)

    monkeypatch.setattr(AdapterModel, "_run", run)
    return made


def scored(model, share, cache, start=None):
    return add_reference_logps(model, share, BUDGET, start, cache).reference_logps


def test_what_was_computed_is_found_by_another_process(model, share, passes, tmp_path):
    expected = scored(model, share, None)
    computed, flops = len(passes), model.flops
    assert torch.equal(scored(model, share, ReferenceCache(tmp_path)), expected)
    assert len(passes) == 2 * computed > 2
    model.write(
        {n: torch.ones_like(t) for n, t in model.read().items()}
    )  # the adapter is switched off
    again = ReferenceCache(tmp_path)
    before = model.flops
    assert torch.equal(scored(model, share, again), expected)
    assert torch.equal(scored(model, share, again), expected)
    assert len(passes) == 2 * computed
    assert model.flops - before == pytest.approx(2 * flops)  # costs are those of who computes them


def test_other_weights_starts_tokens_and_precision_are_not_found(model, share, passes, tmp_path):
    cache = ReferenceCache(tmp_path)
    scored(model, share, cache)
    known = cache.model(model, None)
    other = model.read()
    assert cache.model(model, other) != known
    changed = {name: tensor + 1 for name, tensor in other.items()}
    assert cache.model(model, changed) not in (known, cache.model(model, other))
    model.autocast = torch.bfloat16
    assert cache.model(model, None) != known
    model.autocast = None
    with torch.no_grad():
        next(p for p in model.model.parameters() if not p.requires_grad)[0] += 1
    assert ReferenceCache(tmp_path).model(model, None) != known
    tokens = share.tokens.tokens.copy()
    tokens[0] += 1
    computed = len(passes)
    expected = scored(model, share, None)
    one = replace(share, tokens=replace(share.tokens, tokens=tokens))
    assert not torch.equal(scored(model, one, cache), expected)
    assert len(passes) > computed


def test_a_damaged_file_counts_for_what_is_whole_of_it(model, share, passes, tmp_path):
    expected = scored(model, share, ReferenceCache(tmp_path))
    (file,) = tmp_path.iterdir()
    data = file.read_bytes()
    whole, size = _entries(data)
    assert size == len(data) and len(whole) > 1
    file.write_bytes(data[:-3])
    computed = len(passes)
    assert torch.equal(scored(model, share, ReferenceCache(tmp_path)), expected)
    assert len(passes) == computed + 1 and file.read_bytes() == data
    file.write_bytes(b"\1" + data[1:])  # a key that is another: nothing behind it is trusted
    assert torch.equal(scored(model, share, ReferenceCache(tmp_path)), expected)
    assert len(passes) == 1 + computed + len(whole)


def test_files_take_no_more_room_than_they_may(model, share, tmp_path):
    scored(model, share, ReferenceCache(tmp_path))
    (file,) = tmp_path.iterdir()
    room = file.stat().st_size
    (tmp_path / "older").write_bytes(bytes(8))
    os.utime(tmp_path / "older", (1, 1))
    file.unlink()
    scored(model, share, ReferenceCache(tmp_path, room + 7))
    assert [own.name for own in tmp_path.iterdir()] == [file.name]
    file.unlink()
    scored(model, share, ReferenceCache(tmp_path, room - 1))
    assert sum(own.stat().st_size for own in tmp_path.iterdir()) < room


def test_without_a_folder_and_of_empty_models_nothing_is_written(model, share, passes, tmp_path):
    cache = ReferenceCache(None)
    expected = scored(model, share, cache)
    computed = len(passes)
    assert torch.equal(scored(model, share, cache), expected) and len(passes) == computed
    (tmp_path / "file").touch()
    unwritable = ReferenceCache(tmp_path / "file" / "below")
    assert torch.equal(scored(model, share, unwritable), expected)
