"""FedAdagrad, FedAdam and FedYogi by hand: eta 0.1, tau 0.01, beta1 0.5, beta2 0.9, three rounds.

Clients weigh alike: from (0, 1) they reach (0.19, 0.62) and (0.57, 1.19), d = (0.38, -0.095).
FedAdagrad: v = 0.0001 + d^2 = (0.1445, 0.009125), step 0.1 d / (sqrt(v) + 0.01) = (0.09740, -0.09003).
FedAdam: v = 0.9 0.0001 + 0.1 d^2 = (0.01453, 0.0009925): (0.29110, -0.22889).
FedYogi: v = 0.0001 - 0.1 d^2 sign(0.0001 - d^2) = (0.01454, 0.0010025): (0.29101, -0.22802).
The later rounds are the same lines in numpy; both readings of the second moment start alike, since
the first momentum is the first change.
"""

import pytest
import torch

from fedloom.federation.presence import Presence
from fedloom.federation.protocol import Cohort, Replies
from fedloom.methods import METHODS
from fedloom.tensors import part_of
from fedloom.wire.messages import Payload, Reply

EXPECTED = {
    ("fedadagrad", None): [[0.09740304, 0.90997383], [0.1650258, 0.85151971], [0.21951302, 0.80705035]],
    ("fedadam", "delta"): [[0.29109751, 0.77110622], [0.50635432, 0.60476073], [0.68188383, 0.49618042]],
    ("fedadam", "momentum"): [[0.29109751, 0.77110622], [0.49877339, 0.61789701], [0.66485411, 0.5201522]],
    ("fedyogi", "delta"): [[0.29100506, 0.771976], [0.50026903, 0.61125529], [0.66604574, 0.50627676]],
    ("fedyogi", "momentum"): [[0.29100506, 0.771976], [0.49329733, 0.62305843], [0.65079094, 0.53027603]],
}  # fmt: skip


@pytest.mark.parametrize(("name", "mode"), EXPECTED)
def test_three_rounds(play, name, mode):
    settings, method = METHODS[name]
    constants = {"eta": 0.1, "tau": 0.01}
    if mode:
        constants |= {"beta1": 0.5, "beta2": 0.9, "second_moment": mode}
    found = play(method(settings(**constants))).adapters
    for one, expected in zip(found, EXPECTED[name, mode], strict=True):
        assert one == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("name", ["fedadagrad", "fedadam", "fedyogi"])
def test_the_defaults_are_the_papers(name):
    settings = METHODS[name][0]()
    assert (settings.eta, settings.tau) == (1e-3, 1e-3)
    if name != "fedadagrad":
        assert (settings.beta1, settings.beta2) == (0.5, 0.99)
        assert settings.second_moment == "delta"


def test_nothing_that_comes_in_is_written_to(play):
    settings, method = METHODS["fedyogi"]
    states = play(method(settings())).states
    first = part_of(states[0].tensors, "second_moment")["lora_w"].clone()
    assert not first.equal(part_of(states[1].tensors, "second_moment")["lora_w"])
    assert first.equal(part_of(states[0].tensors, "second_moment")["lora_w"])


@pytest.mark.parametrize("adapter", ["q.lora_A.weight", "q.ia3_l", "q.ln_tuning_layers.weight"])
def test_a_head_that_is_shared_takes_the_plain_mean(adapter):
    settings, method = METHODS["fedadam"]
    fedadam = method(settings())
    head = "model.score.weight"
    start = {adapter: torch.zeros(2), head: torch.zeros(2)}
    generator = fedadam.round(
        fedadam.initial_state(start), Cohort(1, (0, 1), Presence.of({0: 1, 1: 3}), 0.1)
    )
    next(generator)
    sent = [{n: torch.full((2,), v) for n in start} for v in (1.0, 3.0)]
    replies = [Reply(i, Payload(t, {"examples": 1})) for i, t in enumerate(sent)]
    with pytest.raises(StopIteration) as stop:
        generator.send(Replies(replies))
    shared = fedadam.shared(stop.value.value)
    assert list(shared) == [adapter, head] and shared[head].tolist() == [2.0, 2.0]
    assert 0 < shared[adapter][0] < 0.1
