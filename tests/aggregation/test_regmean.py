"""RegMean's closed form: cases worked out by hand, and least squares as the oracle."""

import pytest
import torch

from fedloom.aggregation.regmean import kept_diagonal, packed, regmean, unpacked

W1 = torch.eye(2).double()
W2 = torch.tensor([[3.0, 1], [1, 2]]).double()
X1 = torch.tensor([[1.0, 0], [1, 1]]).double()
X2 = torch.tensor([[2.0, 0], [0, 1]]).double()
ZERO = torch.zeros(2, 2).double()


def gram(inputs):
    return inputs.T @ inputs


def objective(found):
    return sum(float((x @ found.T - x @ w.T).square().sum()) for x, w in ((X1, W1), (X2, W2)))


def test_by_hand_and_by_least_squares():
    # G1 = [[2, 1], [1, 1]], G2 = diag(4, 1)
    found = regmean([W1, W2], [gram(X1), gram(X2)], ZERO)
    expected = torch.tensor([[26 / 11, -2 / 11], [7 / 11, 13 / 11]]).double()
    assert torch.allclose(found, expected)
    assert objective(found) == pytest.approx(8.5454545) and objective((W1 + W2) / 2) == 10
    outputs = torch.cat([X1 @ W1.T, X2 @ W2.T])
    assert torch.allclose(found.T, torch.linalg.lstsq(torch.cat([X1, X2]), outputs).solution)
    # solving for the change from any start gives the same
    assert torch.allclose(regmean([W1, W2], [gram(X1), gram(X2)], 7 * W2), expected)


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (0.5, [[2.31914894, 0.17021277], [0.63829787, 1.34042553]]),
        (0.0, [[7 / 3, 0.5], [2 / 3, 1.5]]),
    ],
)
def test_less_of_what_is_beside_the_diagonal(share, expected):
    kept = [kept_diagonal(gram(x), share) for x in (X1, X2)]
    assert torch.allclose(regmean([W1, W2], kept, ZERO), torch.tensor(expected).double())


def test_sums_weigh_by_tokens_and_means_do_not():
    twice = torch.cat([X2, X2])
    found = regmean([W1, W2], [gram(X1), gram(twice)], ZERO)
    expected = [[2.58620690, 0.13793103], [0.75862069, 1.41379310]]
    assert torch.allclose(found, torch.tensor(expected).double())
    means = [gram(X1) / 2, gram(twice) / 4]
    once = regmean([W1, W2], [gram(X1), gram(X2)], ZERO)
    assert torch.allclose(regmean([W1, W2], means, ZERO), once)


def test_of_lora_with_one_a():
    # A = (1, 0, 1): H = A G A^T = 2 and 4; B* = (1*2 + 3*4, 2*4) / 6
    a = torch.tensor([[1.0, 0, 1]]).double()
    x1 = torch.tensor([[1.0, 0, 0], [0, 1, 1]]).double()
    x2 = torch.tensor([[2.0, 5, 0]]).double()
    products = [gram(x @ a.T) for x in (x1, x2)]
    assert [float(own) for own in products] == [2, 4]
    b1, b2 = torch.tensor([[1.0], [0]]).double(), torch.tensor([[3.0], [2]]).double()
    found = regmean([b1, b2], products, torch.zeros(2, 1).double())
    assert found.flatten().tolist() == pytest.approx([7 / 3, 4 / 3])
    # the least change of outputs over all W = B A
    outputs = torch.cat([x1 @ a.T @ b1.T, x2 @ a.T @ b2.T])
    best = torch.linalg.lstsq(torch.cat([x1, x2]) @ a.T, outputs).solution
    assert torch.allclose(found.T, best)


def test_what_must_hold():
    g = gram(X1)
    assert torch.allclose(regmean([W1, W2], [g, g], ZERO), (W1 + W2) / 2)
    assert torch.allclose(regmean([W2, W2], [g, gram(X2)], ZERO), W2)
    assert torch.allclose(regmean([W2], [g], ZERO), W2)
    # orthogonal inputs: no loss for either
    g1, g2 = (
        torch.diag(torch.tensor([2.0, 0])).double(),
        torch.diag(torch.tensor([0, 3.0])).double(),
    )
    found = regmean([W1, W2], [g1, g2], ZERO)
    assert torch.equal(found, torch.stack([W1[:, 0], W2[:, 1]], 1))


def test_what_nobody_sees_stays_at_the_start():
    seen = torch.diag(torch.tensor([1.0, 0])).double()
    start = torch.full((2, 2), 5.0).double()
    found = regmean([W1, W2], [seen, seen], start, ridge=1e-9)
    assert torch.allclose(found[:, 0], ((W1 + W2) / 2)[:, 0]) and torch.equal(
        found[:, 1], start[:, 1]
    )
    assert torch.equal(regmean([W1], [ZERO], start, ridge=1e-9), start)
    with pytest.raises(ValueError, match="a ridge is needed"):
        regmean([W1, W2], [seen, seen], start)


def test_a_triangle_travels():
    own = torch.tensor([[1.0, 2, 3], [2, 4, 5], [3, 5, 6]]).double()
    assert packed(own).tolist() == [1, 2, 3, 4, 5, 6]
    assert torch.equal(unpacked(packed(own), 3), own)


def test_a_ridge_by_hand():
    """Inner products 2 and 4, of which half the mean, 1.5, is the ridge: 2 x 3 / 3.5 and 4 x 5 / 5.5."""
    weights, products = torch.tensor([[3.0, 5.0]]).double(), torch.diag(torch.tensor([2.0, 4.0]))
    found = regmean([weights], [products.double()], 0 * weights, ridge=0.5)
    assert found[0].tolist() == pytest.approx([6 / 3.5, 20 / 5.5])
    small = regmean([weights], [0.25 * products.double()], 0 * weights, ridge=0.5)
    assert torch.allclose(small, found)  # at any scale of the inputs
