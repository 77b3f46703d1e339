"""The selector by hand: logits (1, 0) and label A cost log(1 + e^-1) = 0.31326169, in both orders."""

import pytest
import torch

from fedloom.data.client_rows import TokenShare
from fedloom.data.encode import TextEncoder
from fedloom.data.examples import Preference
from fedloom.data.selection import both_orders, question
from fedloom.data.tokenize import tokenize
from fedloom.evaluation.held_out import HeldOut
from fedloom.evaluation.metrics import selection_metrics
from fedloom.models.adapters import AdapterModel, AdapterSettings, attach_adapter
from fedloom.models.load import load_backbone, load_tokenizer
from fedloom.objectives.selector import letter_margins, selector_loss
from fedloom.training.layout import Budget
from fedloom.training.passes import Layout

PAIRS = [
    Preference(0, "Ada asks: where?", " Here it is.", " No."),
    Preference(1, "Ben asks again: where is the cup?", " Gone.", " On the shelf, my friend."),
    Preference(2, ({"role": "user", "content": "When?"},), ({"role": "assistant", "content": "Now"},), ({"role": "assistant", "content": "Then"},)),
]  # fmt: skip


def test_hand_numbers():
    loss, metrics = selector_loss(torch.tensor([1.0]))
    assert loss.item() == pytest.approx(0.31326169, abs=1e-7)
    assert metrics["selection_accuracy"].item() == 1
    assert selector_loss(torch.tensor([1.0, 0.0]))[1]["selection_accuracy"].item() == 0.75


def test_metrics_by_hand():
    """Margins 2 and -1 are a pair won by 1/2; -1 and -1 one lost; of four questions one is right."""
    found = selection_metrics(torch.tensor([[2.0, -1.0], [-1.0, -1.0]]))
    assert found["selection_accuracy"] == 0.5 and found["single_order_accuracy"] == 0.25
    assert found["first_chosen"] == 0.75  # A is said of (2) and, asked the other way, of both (-1)


def test_both_orders_are_asked():
    asked = both_orders(PAIRS[0])
    assert asked[0] == question(PAIRS[0].prompt, "Here it is.", "No.")
    assert asked[1] == question(PAIRS[0].prompt, "No.", "Here it is.")
    assert asked[0].endswith("Answer A: Here it is.\nAnswer B: No.\nBetter answer: ")
    assert "user: When?" in both_orders(PAIRS[2])[0]


@pytest.fixture(scope="module")
def model(model_folder):
    pad = load_tokenizer(model_folder).pad_token_id
    backbone = load_backbone(model_folder, pad_token_id=pad)
    attached = attach_adapter(backbone, AdapterSettings(rank=2))
    found = AdapterModel(attached, pad)
    for number, parameter in enumerate(found.parameters.values()):
        torch.manual_seed(number)
        torch.nn.init.normal_(parameter, std=0.3)
    return found


@pytest.fixture(scope="module")
def tokens(model_folder):
    return tokenize(PAIRS, TextEncoder(load_tokenizer(model_folder), compares=True), 200)


def test_one_token_is_trained_on_and_it_is_the_letter(model_folder, tokens):
    letters = load_tokenizer(model_folder)
    for number in range(2 * len(PAIRS)):
        ids, mask = tokens.sequence(number)[0], tokens.mask(number)
        assert mask.sum() == 1 and mask[-1]
        assert letters.decode(ids[mask]).strip() == "AB"[number % 2]


def margins(model, tokens):
    with torch.no_grad():
        batches = list(Layout(model, TokenShare(tokens), Budget(8, None)).everything())
        return torch.cat([letter_margins(model, batch.sequences) for _, batch in batches], 1)


def test_margins_are_those_of_the_letters_logits(model, model_folder, tokens):
    (indices, _) = next(Layout(model, TokenShare(tokens), Budget(8, None)).everything())
    found = margins(model, tokens)
    a, b = (int(tokens.tokens[tokens.starts[n + 1] - 1]) for n in range(2))
    with torch.no_grad():
        for column, row in enumerate(indices):
            for order, (right, wrong) in enumerate(((a, b), (b, a))):
                ids = torch.from_numpy(tokens.sequence(2 * row + order)[0][:-1].astype("int64"))[
                    None
                ]
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -1]
                expected = float(logits[right] - logits[wrong])
                assert float(found[order, column]) == pytest.approx(expected, abs=1e-4)


def test_swapping_answers_and_label_changes_no_loss(model, model_folder, tokens):
    """Each pair is asked in both orders: swapped, A's question with answer B costs what B's did with A."""
    turned = [Preference(p.row, p.prompt, p.rejected, p.chosen) for p in PAIRS]
    other = tokenize(turned, TextEncoder(load_tokenizer(model_folder), compares=True), 200)
    found, swapped = margins(model, tokens), margins(model, other)
    assert torch.allclose(swapped, -found.flip(0), atol=1e-4)


def test_held_out_pairs_are_judged_by_both_orders(model, tokens):
    held_out = HeldOut(TokenShare(tokens), "selection", 0.1, 1.0, 2)
    found = held_out.score(model)
    expected = selection_metrics(margins(model, tokens))
    assert found == pytest.approx(expected, abs=1e-4)
    assert held_out.sample.metric == "selection_accuracy" and len(held_out.sample.totals) == 3


def test_what_does_not_fit_is_left_out_with_its_reason(model_folder):
    encoder = TextEncoder(load_tokenizer(model_folder), compares=True)
    found = tokenize(PAIRS, encoder, 24)
    assert not len(found) and {own.reason for own in found.dropped} == {"no completion token left"}
