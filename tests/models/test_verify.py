"""Saved models are compared with trained ones on hand values, and a base is shared without being changed."""

import re

import peft
import pytest
import torch

from fedloom.accounting.flops import LinearShape, ModelShape
from fedloom.errors import VerificationError
from fedloom.models.verify import (
    LONGEST,
    Outputs,
    affordable,
    allowed,
    compare,
    fresh_base,
    fresh_copy,
    outputs,
    shortened,
    together,
)

CPU = torch.device("cpu")
PLACES = ("held-out row 4", "held-out row 9")


def said(*rows, rewards=(), largest=10.0):
    return Outputs(
        tuple(map(torch.tensor, rows)), tuple(torch.tensor([own]) for own in rewards), largest
    )


def compared(own, other, dtype=torch.float32):
    return compare(own, other, dtype=dtype, name="the adapter", places=PLACES)


@pytest.mark.parametrize(
    ("dtype", "largest", "nats"),
    [
        (torch.float32, 10.0, 1e-4),  # 4 x 2^-24 x 10 is less
        (torch.float32, 1000.0, 4 * 1000 / 2**24),
        (torch.bfloat16, 10.0, 0.15625),  # 4 x 2^-8 x 10
        (torch.bfloat16, 0.001, 1e-4),
    ],
)
def test_what_is_allowed_is_twice_the_rounding_of_two_logits(dtype, largest, nats):
    assert allowed(dtype, largest) == pytest.approx(nats, rel=1e-6)


def test_the_row_that_differs_most_is_named():
    own, other = said([-1.0, -2.0], [-3.0, -4.0]), said([-1.0, -2.01], [-3.5, -4.0])
    with pytest.raises(VerificationError) as told:
        compared(own, other)
    assert "the adapter is not the model that was trained" in str(told.value)
    assert "log-probs of held-out row 9 differ by 0.5 nats" in str(told.value)
    assert "(0.0001 is allowed)" in str(told.value) and told.value.exit_code == 7


def test_what_rounding_explains_is_no_difference():
    own, other = said([-1.0, -2.0], [-3.0, -4.0]), said([-1.0, -2.1], [-3.0, -4.0])
    found = compared(own, other, torch.bfloat16)
    assert found.difference == pytest.approx(0.1) and found.allowed == 0.15625
    with pytest.raises(VerificationError):
        compared(own, other)


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_are_the_same_on_both_sides_or_differ(odd):
    own, other = said([odd, -2.0], [-3.0]), said([-1.0, -2.0], [-3.0])
    assert compared(own, own).difference == 0
    for pair in ((own, other), (other, own)):
        with pytest.raises(VerificationError, match="held-out row 4 differ by inf nats"):
            compared(*pair)


def test_rewards_are_compared_where_there_are_some():
    own = said([-1.0], [-2.0], rewards=(0.5, 1.0))
    assert compared(own, said([-1.0], [-2.0])).difference == 0  # loaded without the reward head
    with pytest.raises(VerificationError, match="rewards of held-out row 9 differ by 1 nats"):
        compared(own, said([-1.0], [-2.0], rewards=(0.5, 2.0)))


def test_a_classifier_of_other_classes_differs():
    with pytest.raises(
        VerificationError, match="of held-out row 4 it gives 3 numbers, the trained model 2"
    ):
        compared(said([-1.0, -2.0], [-1.0, -2.0]), said([-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0]))


def test_outputs_are_log_probs_of_the_tokens_themselves(model_folder):
    base = fresh_base(str(model_folder), revision=None, dtype=torch.float32, device=CPU)
    rows = [[1, 5, 9, 7], [1, 20]]
    found = outputs(base, rows, device=CPU)
    with torch.no_grad():
        logits = base(input_ids=torch.tensor([rows[0]])).logits[0]
    expected = [float(logits[i].log_softmax(-1)[rows[0][i + 1]]) for i in range(3)]
    assert found.rows[0].tolist() == pytest.approx(expected, abs=1e-5)
    assert [len(row) for row in found.rows] == [3, 1] and found.rewards == ()
    longest = outputs(base, [[1] * (LONGEST + 1)], device=CPU)
    assert len(longest.rows[0]) == LONGEST - 1


def test_what_is_put_on_a_copy_is_not_on_the_base(model_folder):
    base = fresh_base(str(model_folder), revision=None, dtype=torch.float32, device=CPU)
    rows, names = [[1, 5, 9, 7]], [name for name, _ in base.named_modules()]
    before = outputs(base, rows, device=CPU)
    copy = fresh_copy(base)
    shared = dict(base.named_parameters())
    assert all(own is shared[name] for name, own in copy.named_parameters())
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = outputs(peft.get_peft_model(copy, config), rows, device=CPU)
    assert not torch.equal(adapted.rows[0], before.rows[0])
    assert [name for name, _ in base.named_modules()] == names
    assert torch.equal(outputs(base, rows, device=CPU).rows[0], before.rows[0])
    assert not any(re.search("lora", name) for name in names)


def test_the_first_and_the_last_tokens_of_a_row_stay():
    """BART's classifier reads the state at the end token: without one it does not run."""
    assert shortened([5, 6, 7, 8, 2], 3) == [5, 8, 2] and shortened([5, 6, 7, 2], 2) == [5, 2]
    assert shortened([5, 6, 2], 3) == [5, 6, 2]


def test_rows_of_one_length_are_passed_together():
    assert together([8] * 8) == [[0, 1, 2, 3, 4, 5, 6, 7]]
    assert together([3, 2, 3]) == [[0, 2], [1]]
    # 256 // 100: a pass has no more logits than one of a row of 256 tokens
    assert together([100] * 5) == [[0, 1], [2, 3], [4]]
    assert together([256, 256]) == [[0], [1]]


def test_rows_together_give_what_they_give_alone_in_their_order(model_folder):
    base = fresh_base(str(model_folder), revision=None, dtype=torch.float32, device=CPU)
    passes = []
    base.register_forward_hook(lambda *_: passes.append(1))
    rows = [[1, 5, 9, 7], [1, 20], [1, 30, 31, 32], [1, 40, 41, 42]]
    found = outputs(base, rows, device=CPU)
    assert len(passes) == 2
    alone = [outputs(base, [row], device=CPU) for row in rows]
    for own, other in zip(found.rows, alone, strict=True):
        assert torch.allclose(own, other.rows[0], rtol=0, atol=1e-5)
    assert found.largest == pytest.approx(max(own.largest for own in alone), rel=1e-5)


@pytest.mark.parametrize(
    ("spent", "folders", "tokens"),
    [
        (0, 1, 208),  # 1e11 FLOPs / (2 x 1e7 a token x 8 rows x 3 passes) = 208.3
        (0, 10, 29),  # / (2e7 x 8 x 21) = 29.8
        (0, 100, 4),  # 3.1, and 4 at least
        (1e15, 10, 256),  # 1e13 / (2e7 x 8 x 21) = 2976, and 256 at most
        (2e13, 10, 59),  # 2e11 / (2e7 x 8 x 21) = 59.5
    ],
)
def test_rows_are_as_long_as_costs_little_beside_the_run(spent, folders, tokens):
    """A model of 1e7 weights, two FLOPs a token for each, in its head alone."""
    shape = ModelShape((), LinearShape(1000, 10_000), 0, 0)
    assert affordable(shape, spent, folders) == tokens
