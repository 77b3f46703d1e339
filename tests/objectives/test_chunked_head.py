"""Log-probs from hidden states, some positions at a time, against all logits at once."""

import pytest
import torch
from torch import nn

from fedloom.data.batch import Predicting
from fedloom.objectives import chunked_head
from fedloom.objectives.chunked_head import token_logps

HIDDEN, WIDTH, TOKENS = 5, 11, 7


@pytest.fixture(params=[1 << 24, 33, 1], ids=["one chunk", "three tokens", "a token"])
def chunk(request, monkeypatch):
    monkeypatch.setattr(chunked_head, "CHUNK", request.param)


def parts(*, trained=False, dtype=torch.float32):
    torch.manual_seed(0)
    layer = nn.Linear(HIDDEN, WIDTH, dtype=dtype).requires_grad_(trained)
    states = torch.randn(TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    return layer, states, torch.arange(TOKENS) * 3 % WIDTH


def capped(layer):
    return lambda states: torch.tanh(layer(states) / 0.5) * 0.5


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_values_and_gradients_are_those_of_all_logits(chunk, trained):
    layer, states, targets = parts(trained=trained)
    logits, weights = capped(layer), torch.linspace(-1, 2, TOKENS)
    whole = logits(states).log_softmax(-1)
    wanted = [states, *(layer.parameters() if trained else ())]
    expected = whole[torch.arange(TOKENS), targets]
    slopes = torch.autograd.grad((expected * weights).sum(), wanted)
    logps, correct = token_logps(Predicting(states, logits, WIDTH, trained), targets)
    torch.testing.assert_close(logps, expected)
    assert correct.tolist() == (whole.argmax(-1) == targets).tolist()
    found = torch.autograd.grad((logps * weights).sum(), wanted)
    for one, other in zip(found, slopes, strict=True):
        torch.testing.assert_close(one, other)


def test_without_a_gradient_none_is_worked_out(chunk):
    layer, states, targets = parts()
    with torch.no_grad():
        logps, _ = token_logps(Predicting(states, layer, WIDTH, False), targets)
    assert not logps.requires_grad
    expected = layer(states).log_softmax(-1)[torch.arange(TOKENS), targets]
    torch.testing.assert_close(logps, expected.detach())
    none, correct = token_logps(Predicting(states[:0].detach(), layer, WIDTH, False), targets[:0])
    assert none.shape == correct.shape == (0,)


def test_logits_in_bfloat16_are_summed_in_float32(chunk):
    layer, states, targets = parts(dtype=torch.bfloat16)
    logps, _ = token_logps(Predicting(states, layer, WIDTH, False), targets)
    assert logps.dtype == torch.float32
    expected = layer(states).float().log_softmax(-1)[torch.arange(TOKENS), targets]
    torch.testing.assert_close(logps, expected)
    (slope,) = torch.autograd.grad(logps.sum(), states)
    assert slope.dtype == torch.bfloat16


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_the_likeliest_tokens_are_marked_so(chunk, trained):
    layer, states, targets = parts(trained=trained)
    likeliest = layer(states).argmax(1)
    targets = torch.where(torch.arange(TOKENS) % 3 == 1, (likeliest + 1) % WIDTH, likeliest)
    _, correct = token_logps(Predicting(states, layer, WIDTH, trained), targets)
    assert correct.tolist() == [True, False, True, True, False, True, True]


class Watched:
    """An output layer that notes of how many states its logits were asked, and whether with a graph."""

    def __init__(self, layer):
        self.layer, self.sizes, self.graphs = layer, [], set()

    def __call__(self, own):
        found = self.layer(own)
        self.sizes.append(len(own))
        self.graphs.add((found.requires_grad, own.is_leaf))
        return found


@pytest.mark.parametrize(
    ("held", "sizes"), [(2 * WIDTH, [2, 2, 2, 1]), (1, [1] * 7), (7 * WIDTH, [7])]
)
def test_no_more_logits_are_held_than_a_chunk(monkeypatch, held, sizes):
    monkeypatch.setattr(chunked_head, "CHUNK", held)
    layer, states, targets = parts()
    logits = Watched(layer)
    token_logps(Predicting(states, logits, WIDTH, False), targets)[0].sum().backward()
    assert logits.sizes == sizes  # and none again in the backward pass
    assert logits.graphs == {(True, True)}  # each chunk's graph ends at its own states
    logits = Watched(parts(trained=True)[0])
    for own in (states, states.detach()):
        logits.sizes.clear()
        token_logps(Predicting(own, logits, WIDTH, True), targets)[0].sum().backward()
        again = sizes if len(sizes) > 1 else []  # one chunk is not computed twice
        assert sorted(logits.sizes) == sorted(sizes + again)


def test_no_graph_is_made_where_none_is_wanted():
    layer, states, targets = parts()
    logits = Watched(layer)
    token_logps(Predicting(states.detach(), logits, WIDTH, False), targets)
    with torch.no_grad():
        token_logps(Predicting(states, logits, WIDTH, False), targets)
    assert {graph for graph, _ in logits.graphs} == {False}
