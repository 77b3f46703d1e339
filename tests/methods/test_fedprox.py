"""FedProx by hand, with mu = 0.5, and its gradient by finite differences.

The first step is FedAvg's (w equals the start, so the term is zero): client 0 is at (0.1, 0.8). The
second adds 0.5 (w - w_t): 0.1 - 0.1 (0.1 - 1 + 0.05) = 0.185, 0.8 - 0.1 (0.8 + 1 - 0.1) = 0.63.
Client 1: 0.3 -> 0.555, 1.1 -> 1.185. Mean: ((0.185 + 3 0.555) / 4, (0.63 + 3 1.185) / 4).
"""

import pytest
import torch

from fedloom.methods.fedprox import FedProx, FedProxSettings, proximal_gradient

EXPECTED = [[0.4625, 1.04625], [0.8394375, 1.08394375], [1.14664156, 1.11466416]]


def test_three_rounds(play):
    found = play(FedProx(FedProxSettings(mu=0.5))).adapters
    for one, expected in zip(found, EXPECTED, strict=True):
        assert one == pytest.approx(expected, abs=1e-8)


def test_the_default_is_the_papers_and_zero_is_fedavg(play):
    assert FedProxSettings().mu == 0.01
    found = play(FedProx(FedProxSettings(mu=0.0))).adapters
    assert found[-1] == pytest.approx([1.1713975, 1.11713975], abs=1e-12)


def test_the_gradient_gains_exactly_the_proximal_term():
    """Central differences of mu/2 ||w - w_t||^2 against what the hook adds to the gradient."""
    torch.manual_seed(0)
    start = {"a": torch.randn(3, 2, dtype=torch.float64), "b": torch.randn(4, dtype=torch.float64)}
    parameters = {n: torch.nn.Parameter(torch.randn_like(t)) for n, t in start.items()}
    before = {n: torch.randn_like(t) for n, t in start.items()}
    for name, parameter in parameters.items():
        parameter.grad = before[name].clone()
    proximal_gradient(start, 0.3)(parameters)
    for name, parameter in parameters.items():
        added = (parameter.grad - before[name]).reshape(-1)
        for i in range(added.numel()):
            shifted = [parameter.detach().clone().reshape(-1) for _ in range(2)]
            shifted[0][i] += 1e-5
            shifted[1][i] -= 1e-5
            up, down = (0.15 * (w - start[name].reshape(-1)).square().sum() for w in shifted)
            assert added[i].item() == pytest.approx((up - down).item() / 2e-5, abs=1e-8)


def test_a_tensor_without_a_gradient_is_left_alone():
    parameter = torch.nn.Parameter(torch.ones(2))
    proximal_gradient({"lora_w": torch.zeros(2)}, 1.0)({"lora_w": parameter})
    assert parameter.grad is None
