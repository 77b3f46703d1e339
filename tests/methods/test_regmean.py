"""RegMean in rounds: what travels, what is solved, what is refused."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from fedloom.aggregation.lora import A, B
from fedloom.aggregation.regmean import packed, unpacked
from fedloom.errors import MessageError, ModelError
from fedloom.methods.regmean import PRODUCTS, RegMean, RegMeanSettings, _check, bounded
from fedloom.models.inner_products import InnerProducts, collecting
from fedloom.runs.assembly import assemble
from fedloom.runs.partitioning import partition_data
from fedloom.wire.messages import Payload, decode

SMALL = {
    "method": {"name": "regmean"},
    "federation": {"clients": 3, "rounds": 1},
    "data": {"builtin_rows": 40},
    "training": {"local_steps": 2, "batch_size": 4},
}


@pytest.fixture
def watched(experiment, federate, once):
    """Play a round, the plain one once; return what came of it and the replies."""

    def play(**sections):
        return once(str(sections), lambda: one(sections))

    def one(sections):
        found = []

        def watch(parts):
            exchange = parts.engine.exchange

            def watched(asked):
                answers = list(exchange(asked))
                if asked.action == "train":
                    found.extend(decode(own.data, asked.reply_schema) for own in answers)
                return answers

            parts.engine.exchange = watched

        played = federate(experiment(**{**SMALL, **sections}), watch)
        return played, found

    return play


def test_b_is_what_least_squares_makes_of_what_was_sent(watched):
    played, answers = watched()
    start = {n: t.double() for n, t in played.parts.initial.items()}
    rows = [own.numbers["examples"] * own.numbers["tokens_per_row"] for own in answers]
    assert not any(A in name for own in answers for name in own.tensors)
    for name, tensor in played.state.tensors.items():
        rank = tensor.shape[1]
        grams = [unpacked(own.tensors[PRODUCTS + name], rank) for own in answers]
        # rows X_k with X_k^T X_k = n_k H_k, and their outputs under B_k
        inputs = [
            n**0.5 * torch.linalg.cholesky(g + 1e-9 * g.trace() * torch.eye(rank)).T
            for n, g in zip(rows, grams, strict=True)
        ]
        outputs = [x @ own.tensors[name].double().T for x, own in zip(inputs, answers, strict=True)]
        best = torch.linalg.lstsq(torch.cat(inputs), torch.cat(outputs)).solution.T
        assert torch.allclose(tensor.double(), best, atol=1e-5)
        assert not torch.allclose(tensor.double(), start[name])


def test_a_stays_and_the_model_is_an_ordinary_adapter(watched):
    played, _ = watched()
    assert any(A in name for name in played.adapter)
    for name, tensor in played.adapter.items():
        if A in name:
            assert torch.equal(tensor, played.parts.initial[name])


def test_inner_products_are_of_real_tokens_alone(watched):
    """Against the inputs of one layer, row by row without padding."""
    played, answers = watched()
    client, resources = 1, played.parts.local.resources[1]
    share, model = played.parts.local.shares[client], resources.model
    own = answers[client]
    model.write({**played.parts.initial, **{n: own.tensors[n] for n in played.state.tensors}})
    name = next(n for n in played.state.tensors if "layers.1" in n and "down_proj" in n)
    module = dict(model.model.named_modules())[
        name.replace(B, A).removesuffix(".weight") + ".default"
    ]
    whole, tokens = 0, 0
    hook = module.register_forward_hook(lambda _, given, made: kept.append(made))
    for row in range(len(share)):
        one = share.tokens.take(np.array([row]))
        for first in range(one.width):
            kept = []
            text = one.tokens[one.starts[first] : one.starts[first + 1]]
            with model.evaluating():
                ids = torch.tensor(np.asarray(text).astype(np.int64))[None]
                model(input_ids=ids, attention_mask=torch.ones_like(ids))
            made = kept[0][0].double()
            whole, tokens = whole + made.T @ made, tokens + len(made)
    hook.remove()
    sent = unpacked(own.tensors[PRODUCTS + name], len(whole))
    assert torch.allclose(sent, whole / tokens, rtol=1e-4, atol=1e-7)
    assert own.numbers["tokens_per_row"] == pytest.approx(tokens / len(share))


@pytest.mark.slow
def test_few_rows_and_equal_weights_are_other_answers(watched):
    plain, _ = watched()
    for settings in ({"rows": 2}, {"weights": "clients"}, {"off_diagonal": 0.0}):
        found, _ = watched(method={"name": "regmean", **settings})
        assert any(
            not torch.equal(t, found.state.tensors[n]) for n, t in plain.state.tensors.items()
        )


def test_what_no_rows_have_is_refused():
    b = torch.zeros(4, 2)
    for triangle, words in (
        ([1.0, 2.0, 1.0], "an eigenvalue of -1; those of rows have none below 0"),
        ([float("nan")] * 3, "an eigenvalue"),
        ([-1.0, 0.0, -1.0], "an eigenvalue of -1"),
    ):
        reply = Payload({f"x{B}weight": b, f"{PRODUCTS}x{B}weight": torch.tensor(triangle)})
        with pytest.raises(MessageError, match=words):
            _check(0, reply)
    _check(0, Payload({f"x{B}weight": b, f"{PRODUCTS}x{B}weight": torch.tensor([1.0, 1.0, 1.0])}))


def test_inner_products_far_above_the_others_are_scaled_down():
    eye = torch.eye(2).double()
    found = bounded([eye, 2 * eye, 1e6 * eye])
    assert torch.equal(found[1], 2 * eye) and float(found[2].trace()) == pytest.approx(10 * 4)
    slightly = torch.diag(torch.tensor([1.0, -1e-6])).double()
    assert torch.linalg.eigvalsh(bounded([slightly])[0])[0] >= 0
    assert not bounded([0 * eye])[0].any()
    none, own = bounded([0 * eye, eye])  # a client without inner products stops no other
    assert not none.any() and torch.equal(own, eye)
    assert packed(eye).tolist() == [1, 0, 1]


def test_the_median_is_the_lower_one_of_those_above_0():
    """Of traces 2, 4 and 60 it is 4, of 2 and 60 it is 2: no more than 40, and 20."""
    eye = torch.eye(2).double()
    assert float(bounded([eye, 2 * eye, 30 * eye])[2].trace()) == pytest.approx(40)
    found = bounded([0 * eye, eye, 30 * eye])
    assert float(found[2].trace()) == pytest.approx(20) and torch.equal(found[1], eye)
    assert torch.equal(bounded([eye, 10 * eye])[1], 10 * eye)


@pytest.mark.parametrize(("least", "sound"), [(-0.9e-4, True), (-1.2e-4, False)])
def test_rounding_may_leave_a_ten_thousandth_of_the_sum_below_0(least, sound):
    b = torch.zeros(4, 2)
    reply = Payload({f"x{B}weight": b, f"{PRODUCTS}x{B}weight": torch.tensor([1.0, 0.0, least])})
    with nullcontext() if sound else pytest.raises(MessageError, match="an eigenvalue of"):
        _check(0, reply)


def test_rows_whose_inner_products_are_sent():
    method = RegMean(RegMeanSettings(rows=5))
    found = method._drawn(0, 1, 2, 40).tolist()
    assert len(set(found)) == 5 and found == sorted(found) and max(found) < 40
    assert found != method._drawn(0, 1, 3, 40).tolist()
    assert method._drawn(0, 1, 2, 3).tolist() == [0, 1, 2]


def test_traffic_is_b_both_ways_and_three_inner_products_a_layer_of_rank_2():
    adapter = {f"x{A}weight": torch.zeros(2, 5), f"x{B}weight": torch.zeros(4, 2)}
    form = RegMean(RegMeanSettings()).traffic(adapter)
    assert (form.down, form.up) == (32, 32 + 12)


def test_layers_that_read_some_tokens_alone_are_refused():
    found = InnerProducts()
    found.begin(torch.tensor([[1, 1, 0], [1, 0, 0]]))
    found.add("q.lora_A.weight", torch.ones(2, 3, 1))
    assert found.tokens == 3 and found.sums["q.lora_A.weight"].tolist() == [[3]]
    with pytest.raises(ModelError, match=r"experts\.3 reads some of the tokens alone"):
        found.add("experts.3.lora_A.weight", torch.ones(2, 1))


def test_hooks_do_not_stay(watched):
    played, _ = watched()
    model = played.parts.local.resources[0].model
    with collecting(model):
        pass
    assert not any(module._forward_hooks for module in model.model.modules())
    assert RegMean(RegMeanSettings()).keeps("x.lora_A.weight")


@pytest.mark.parametrize(
    "sections",
    [
        {"method": {"name": "regmean"}},
        {"method": {"name": "lora_fair"}},
        {"aggregation": {"rule": "knots"}},
    ],
    ids=["regmean", "lora_fair", "knots"],
)
def test_stacks_of_experts_are_refused_before_anything_is_trained(
    experiment, mixture_folder, sections
):
    own = experiment(model={"path": str(mixture_folder)}, **sections)
    with pytest.raises(ModelError, match="factors for a stack of experts"):
        assemble(own, partition_data(own))
