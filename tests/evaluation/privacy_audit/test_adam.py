"""The gradient of Adam's first step against torch's own optimizers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedloom.evaluation.privacy_audit.adam import first_gradient, spacing
from fedloom.evaluation.privacy_audit.span import Candidates, recover_tokens

RATE, EPSILON = 1e-3, 1e-8


def stepped(weight: Tensor, gradients: list[Tensor], **options: float) -> Tensor:
    """Return the change of a weight by steps of torch's AdamW, or of Adam where ``adam`` is given."""
    kind = torch.optim.Adam if options.pop("adam", 0) else torch.optim.AdamW
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = kind([parameter], lr=RATE, eps=EPSILON, **{"weight_decay": 0.0, **options})
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach() - weight


def drawn(seed: int, *shape: int) -> Tensor:
    """Return standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_by_hand() -> None:
    """g = 3e-8 with eps 1e-8: u = 3/4, so g = 1e-8 * 0.75 / 0.25 = 3e-8; of a weight that was 0.

    The error of u is 2^-22, that of g eps 2^-22 / (1/4)^2 = 16 eps 2^-22: rows come in its units.
    """
    found = first_gradient(torch.tensor([[-0.75e-3]]), torch.zeros(1, 1), RATE, EPSILON)
    assert found is not None
    uncertain = ((2.0**-34 / 12**0.5 / RATE) ** 2 + 2.0**-44) ** 0.5  # float32 step near 7.5e-4
    error = 1e-8 * uncertain * 16
    assert float(found) * error == pytest.approx(3e-8, rel=1e-6)
    assert spacing(torch.tensor([1.0, 0.75, 0.0])).tolist() == [2.0**-23, 2.0**-24, 0.0]


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1}, {"adam": 1}, {"adam": 1, "weight_decay": 1e-6}]
)
def test_torchs_step_is_inverted(options: dict[str, float]) -> None:
    """Of small gradients and weights every row of the gradient, to a part in a hundred."""
    weight, gradient = 0.01 * drawn(0, 6, 40), 1e-6 * drawn(1, 6, 40)
    found = first_gradient(
        stepped(weight, [gradient], **options),
        weight,
        RATE,
        EPSILON,
        decay=options.get("weight_decay", 0.0),
        decoupled="adam" not in options,
    )
    assert found is not None
    like = torch.nn.functional.cosine_similarity(found, gradient.double())
    assert float(like.min()) > 0.999


def test_no_other_step_is_taken_for_it() -> None:
    """Another rate, two steps of one sign, no step, and what is not finite."""
    weight, gradient = torch.zeros(4, 8), 1e-4 * drawn(2, 4, 8)
    two = stepped(weight, [gradient, gradient])
    assert first_gradient(two, weight, RATE, EPSILON) is None
    one = stepped(weight, [gradient])
    assert first_gradient(one, weight, RATE / 2, EPSILON) is None
    assert first_gradient(0 * one, weight, RATE, EPSILON) is None
    assert first_gradient(one * float("nan"), weight, RATE, EPSILON) is None


def test_tokens_are_read_from_what_hid_them() -> None:
    """64 rows, 24 tokens of 1,000: the step has full rank, the gradient that was read back has 24."""
    embeddings = drawn(3, 1000, 64)
    tokens = list(range(0, 240, 10))
    gradient = 1e-5 * drawn(4, 64, len(tokens)) @ embeddings[tokens]
    weight = 0.1 * drawn(5, 64, 64)
    change = stepped(weight, [gradient])
    read = Candidates(embeddings[:, None])
    plain = recover_tokens(change, read, tokens, {})
    assert plain.rank == plain.limit == 64 and not plain.from_rank
    inverted = first_gradient(change, weight, RATE, EPSILON)
    assert inverted is not None
    found = recover_tokens(inverted, read, tokens, {}, rounding=1.0)
    assert found.from_rank and found.share == 1.0 and found.compared <= len(tokens) + 1
