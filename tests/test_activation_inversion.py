"""The example of what activations give away: nearly all without noise, less with it."""

import importlib.util
from pathlib import Path

import pytest


@pytest.mark.slow
def test_noise_takes_tokens_away_from_the_server():
    path = Path(__file__).parents[1] / "examples" / "activation_inversion.py"
    spec = importlib.util.spec_from_file_location("activation_inversion", path)
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    shares = page.main(texts=2)
    assert shares[0.0] > 0.95
    assert shares[3.0] < 0.7
    assert sorted(shares.values(), reverse=True) == list(shares.values())
