"""Fed-SB by hand, on real rounds, and with clients that are absent; factors of each kind."""

import hashlib
from types import SimpleNamespace

import pytest
import torch

import fedloom
from absent import ALL_OF_IT, CLIENTS, ROUNDS, played
from fedloom.aggregation.lora import A, B, factor_pairs
from fedloom.aggregation.means import weighted_mean
from fedloom.engines.in_process import SimulationEngine
from fedloom.errors import SettingsError, TrainingError
from fedloom.experiment.experiment import Experiment
from fedloom.methods.bases.fixed_factors import (
    R,
    between,
    first_gradient,
    matrix_name,
    random_factors,
)
from fedloom.methods.fed_sb import FACTORS, HAS, FedSB, FedSBSettings
from fedloom.models.backbone_delta import MOVED
from fedloom.objectives.sft import SFT
from fedloom.runs.assembly import assemble
from fedloom.runs.observers import Silent
from fedloom.runs.partitioning import partition_data
from fedloom.runs.run import run_experiment
from fedloom.tensors import part_of
from fedloom.training.coordinates import Coordinates
from fedloom.training.steps import local_loss
from fedloom.wire.messages import Payload, decode


def test_who_just_joined_is_judged_between_the_factors_that_it_is_sent():
    """R = 2 before A of ones, or of threes that are kept; without both R has no meaning, but for 0."""
    a, b = f"x{A}weight", f"x{B}weight"

    def judged(r, sent, kept):
        held = {}
        model = SimpleNamespace(write=held.update, flops=0.0)
        start = {a: torch.full((1, 2), 7.0), b: torch.zeros(2, 1)}
        client = SimpleNamespace(
            store={FACTORS: kept} if kept else {},
            initial=start,
            own_start=False,
            seed=0,
            model=model,
        )
        factors = {f"{FACTORS}/{name}": t for name, t in (sent or {}).items()}
        own = {matrix_name(a): torch.tensor([[r]]), **factors}
        FedSB(FedSBSettings(factors="weights")).load(client, Payload(own))
        assert model.flops == 2 * 1 * 2  # a product of R and A
        return held[a][0, 0].item(), held[b][0, 0].item()

    ones, threes = ({a: torch.full((1, 2), n), b: torch.full((2, 1), n)} for n in (1.0, 3.0))
    assert judged(2.0, ones, None) == judged(2.0, ones, threes) == (2.0, 1.0)
    assert judged(2.0, None, threes) == (6.0, 3.0)
    assert judged(0.0, None, None) == (0.0, 0.0)
    with pytest.raises(TrainingError, match="it lacks the fixed factors"):
        judged(2.0, None, None)


PUBLIC = {"public": {"rows": 12, "labelled": True}}


def tensor(*rows):
    return torch.tensor(rows)


@pytest.fixture
def answers(monkeypatch):
    """Every answer to a request to train: round, client, tensors and rows."""
    seen, plain = [], SimulationEngine.exchange

    def exchange(self, exchange):
        for answer in plain(self, exchange):
            payload = decode(answer.data, exchange.reply_schema)
            if exchange.action == "train":
                seen.append((exchange.round, answer.client, payload.tensors, payload.numbers))
            yield answer

    monkeypatch.setattr(SimulationEngine, "exchange", exchange)
    return seen


def test_the_mean_of_r_is_the_mean_of_products():
    """R = diag(1, 2) and [[3, 1], [1, 0]]: their mean is [[2, .5], [.5, 1]], R A [[2, 4.5], [.5, 2]],
    and B R A [[2, 4.5], [2.5, 6.5]]."""
    up, down = tensor([1.0, 0.0], [1.0, 1.0]), tensor([1.0, 2.0], [0.0, 1.0])
    each = [tensor([1.0, 0.0], [0.0, 2.0]), tensor([3.0, 1.0], [1.0, 0.0])]
    mean = weighted_mean([{"r": own} for own in each], [1.0, 1.0])["r"]
    assert (up @ between(mean, down)).tolist() == [[2.0, 4.5], [2.5, 6.5]]
    products = [up @ between(own, down) for own in each]
    assert (sum(products) / 2).tolist() == [[2.0, 4.5], [2.5, 6.5]]


def test_several_matrices_on_the_diagonal_are_ravan_s_heads():
    """Heads of rank 1 between B = (e1, e2) and A = (1, 1), (1, -1): s H of two clients are (1, 3) and
    (1, 4), of which the mean (1, 3.5) has the product [[1, 1], [3.5, -3.5]]."""
    down = tensor([1.0, 1.0], [1.0, -1.0])
    scaled = [tensor(2.0, 1.0) * tensor(0.5, 3.0), tensor(0.5, 4.0) * tensor(2.0, 1.0)]
    mean = ((scaled[0] + scaled[1]) / 2).view(2, 1, 1)
    assert (torch.eye(2) @ between(mean, down)).tolist() == [[1.0, 1.0], [3.5, -3.5]]


def test_a_step_on_r_is_the_gradient_between_the_factors():
    """L = |B R A x|^2 / 2 with x = (1, 1): A x = (3, 1); at R = diag(1, 2), R A x = (3, 2) and
    B R A x = (3, 5) = y. dL/dR = B^T y (A x)^T = (8, 5)^T (3, 1) = [[24, 8], [15, 5]]."""
    up, down, x = tensor([1.0, 0.0], [1.0, 1.0]), tensor([1.0, 2.0], [0.0, 1.0]), torch.ones(2)
    own = Coordinates(
        {"r": tensor([1.0, 0.0], [0.0, 2.0])},
        lambda held: {"a": between(held["r"], down)},
        torch.device("cpu"),
    )
    adapter = {"a": torch.nn.Parameter(torch.zeros(2, 2))}
    own.write(adapter)
    assert adapter["a"].tolist() == [[1.0, 2.0], [0.0, 2.0]]
    ((up @ adapter["a"] @ x).square().sum() / 2).backward()
    own.pull_back(adapter)
    assert own.parameters["r"].grad.tolist() == [[24.0, 8.0], [15.0, 5.0]]


@pytest.mark.parametrize(
    ("rank", "inputs", "outputs"), [(1, 7, 5), (3, 7, 8), (8, 8, 8), (11, 4, 6)]
)
def test_random_factors_are_orthonormal_and_the_same_bits_everywhere(rank, inputs, outputs):
    like = {f"x{A}weight": torch.zeros(rank, inputs), f"x{B}weight": torch.zeros(outputs, rank)}
    found = random_factors(like, seed=3)
    down, up = found.values()
    for rows, width in ((down, inputs), (up.T, outputs)):
        for begin in range(0, rank, width):  # beyond the width a division of its own
            block = rows[begin : begin + width]
            assert torch.allclose(block @ block.T, torch.eye(len(block)), atol=1e-6)
    other = random_factors(like, seed=4)
    assert rank == 1 or not torch.equal(other[f"x{A}weight"], down)
    if rank == 3:
        bits = hashlib.sha256(down.numpy().tobytes() + up.numpy().tobytes()).hexdigest()
        assert bits[:16] == "6fee31d2a58bdd37"  # of this release, on any machine


def products(adapter, scaling):
    pairs = factor_pairs(adapter).values()
    return {a: scaling * adapter[b].double() @ adapter[a].double() for a, b in pairs}


@pytest.mark.parametrize("rank", [2, 40])
def test_rounds_keep_the_mean_of_products_and_the_factors(experiment, federate, answers, rank):
    """Ranks below and above the width of the model, 32."""
    found = federate(
        experiment(
            method={"name": "fed_sb"},
            adapter={"rank": rank},
            partition={"kind": "size", "sizes": [1.0, 2.0, 3.0]},
            training={"learning_rate": 1e-2, "weight_decay": 0.1, "local_steps": 2},
        )
    )
    method, scaling = found.parts.method, found.parts.model.scaling
    fixed = random_factors(found.parts.initial, 0)
    last = [(sent, numbers["examples"]) for number, _, sent, numbers in answers if number == 2]
    whole = sum(weight for _, weight in last)
    for a, b in factor_pairs(found.adapter).values():
        assert torch.equal(found.adapter[b], fixed[b])  # weight decay reaches R alone
        each = [
            weight / whole * fixed[b].double() @ sent[matrix_name(a)].double() @ fixed[a].double()
            for sent, weight in last
        ]
        exact = scaling * sum(each)
        assert exact.abs().max() > 1e-5
        assert torch.allclose(products(found.adapter, scaling)[a], exact, atol=1e-7)
    assert {n: tuple(t.shape) for n, t in found.state.tensors.items()} == {
        matrix_name(a): (rank, rank) for a in factor_pairs(found.adapter)
    }
    assert method.traffic(found.parts.initial).up == 4 * rank * rank * len(found.state.tensors)


def test_a_head_is_trained_and_averaged_beside_r(experiment, federate, answers):
    found = federate(
        experiment(
            method={"name": "fed_sb"},
            data={"source": "builtin:labelled"},
            objective={"name": "classification"},
            federation={"rounds": 1},
        )
    )
    head = next(name for name in found.adapter if ".lora_" not in name)
    each = [(sent[head], numbers["examples"]) for _, _, sent, numbers in answers]
    mean = sum(t.double() * n for t, n in each) / sum(n for _, n in each)
    assert not torch.equal(found.adapter[head], found.parts.initial[head])
    assert torch.allclose(found.adapter[head].double(), mean, atol=1e-7)


def test_factors_of_a_gradient_are_those_of_the_first_step(experiment):
    settings = experiment(
        method={"name": "fed_sb", "factors": "gradient"}, adapter={"rank": 3}, **PUBLIC
    )
    parts = assemble(settings, partition_data(settings))
    server = parts.method.server
    server.model.write(parts.initial)
    found = first_gradient(server)
    assert all(
        p.grad is None and not p.requires_grad
        for n, p in server.model.model.named_parameters()
        if ".lora_" not in n
    )
    loss = {}
    for sign in (1, -1):  # it is the slope of the loss, along itself
        moved = {f"{MOVED}{name}": sign * 0.02 * g / g.norm() for name, g in found.items()}
        server.model.write({**parts.initial, **moved})
        whole = settings.training.model_copy(update={"batch_size": 12})
        loss[sign] = local_loss(
            server.model, server.public.share, SFT(), whole, seed=0, client=0, round=0, batches=1
        )
    slope = sum(float(g.norm()) for g in found.values())
    assert (loss[1] - loss[-1]) / 0.04 == pytest.approx(slope, rel=0.02)


@pytest.mark.parametrize("kind", ["weights", pytest.param("gradient", marks=pytest.mark.slow)])
def test_fixed_factors_are_sent_once_to_each_client_whenever_it_comes(table, kind):
    """Client 3 comes late, others answer late or go: who lacks the factors is sent them in the same round."""
    table["method"] = {"name": "fed_sb", "factors": kind}
    table |= PUBLIC
    table["training"] |= {"local_steps": 1, "batch_size": 4}
    table["federation"] = {"clients": CLIENTS, "rounds": ROUNDS, "quorum": 0.2}
    found = played(Experiment.from_table(table), ALL_OF_IT)
    factors = part_of(found.states[0].tensors, FACTORS)
    for a, b in factor_pairs(factors).values():
        assert torch.allclose(factors[a] @ factors[a].T, torch.eye(2), atol=1e-5)
        assert torch.allclose(factors[b].T @ factors[b], torch.eye(2), atol=1e-5)
    for number, state in enumerate(found.states, 1):
        replies = found.of("train", number)
        assert replies.keys() == ALL_OF_IT.answering(number)
        weights = [reply.numbers["examples"] for _, reply in replies.values()]
        for name in (name for name in state.tensors if R in name):
            each = [reply.tensors[name].double() for _, reply in replies.values()]
            mean = sum(w * t for w, t in zip(weights, each, strict=True)) / sum(weights)
            assert torch.allclose(state.tensors[name].double(), mean, atol=1e-7)
        has = {int(name.removeprefix(HAS)) for name in state.numbers}
        assert replies.keys() <= has
        for client in has:
            kept = found.kept(client, FACTORS)
            assert all(torch.equal(own, factors[name]) for name, own in kept.items())
    times = [(number, client) for action, number, client, _, _ in found.seen if action == FACTORS]
    # 1 and 0 in the first round and 3 as soon as it comes; 2 and 0 again, once they gave no answer in time
    assert sorted(times) == [(1, 0), (1, 1), (1, 2), (2, 3), (3, 2), (4, 0)]


def test_a_client_that_has_lost_its_factors_is_left_out_and_sent_them_again(experiment, federate):
    lost = []

    def lose(parts):
        plain = parts.engine.exchange

        def exchange(asked):
            if asked.action == "train" and asked.round == 1:
                parts.engine.store.discard(1)  # what it has just stored
            if asked.action == FACTORS:
                lost.append((asked.round, tuple(asked.requests)))
            return plain(asked)

        parts.engine.exchange = exchange

    found = federate(
        experiment(method={"name": "fed_sb", "factors": "weights"}, federation={"quorum": 0.5}),
        lose,
    )
    assert found.records[0].rejected.keys() == {1} and not found.records[1].rejected
    assert "it lacks the fixed factors" in found.records[0].rejected[1]
    assert lost == [(1, (0, 1, 2)), (2, (1,))]


def test_r_may_be_compressed_and_the_factors_are_sent_as_they_are(experiment, federate):
    found = federate(
        experiment(
            method={"name": "fed_sb", "factors": "weights"},
            adapter={"rank": 16},
            wire={"up": "int8", "down": "int8", "keep_plain_below": 0},
            training={"local_steps": 2},
        )
    )
    factors = part_of(found.state.tensors, FACTORS)
    for client in range(3):
        kept = found.parts.engine.store.slots(client)[FACTORS]
        assert all(torch.equal(tensor, kept[name]) for name, tensor in factors.items())
    (cost,) = [c for c in found.costs(0) if c.phase == "train"]
    whole = 4 * 16**2 * len(factor_pairs(found.adapter))
    assert cost.bytes_up < 0.4 * whole and cost.bytes_down < 0.4 * whole
    assert all(r.rejected == {} for r in found.records)


@pytest.mark.slow
def test_machines_are_sent_the_factors_and_give_the_bits_of_one_process(table, loopback, tmp_path):
    table["method"] = {"name": "fed_sb", "factors": "weights"}
    folders = [tmp_path / "here", tmp_path / "there"]
    here, there = (
        Experiment.from_table({**table, "output": {"folder": str(own), "verify": False}})
        for own in folders
    )
    fedloom.run(here)
    run_experiment(there, observer=Silent(), remote=loopback(3).engine(there))
    digests = [(own / "adapter/adapter_model.safetensors").read_bytes() for own in folders]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("kind", [pytest.param("random", marks=pytest.mark.slow), "gradient"])
def test_what_is_saved_is_plain_lora(experiment, kind):
    """PEFT loads it on the backbone, and finds the model that was trained."""
    import peft
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    settings = experiment(
        method={"name": "fed_sb", "factors": kind},
        adapter={"rank": 5},
        clients={"newcomers": [2]},
        federation={"clients": 4},
        output={"verify": True},
        **PUBLIC,
    )
    result = fedloom.run(settings)
    saved = load_file(result.adapter_path / "adapter_model.safetensors")
    assert all(".lora_A." in name or ".lora_B." in name for name in saved)
    config = peft.PeftConfig.from_pretrained(str(result.adapter_path))
    assert (config.peft_type, config.r) == (peft.PeftType.LORA, 5)
    base = AutoModelForCausalLM.from_pretrained(settings.model.path)
    model = peft.PeftModel.from_pretrained(base, str(result.adapter_path))
    assert any(bool(t.any()) for n, t in model.state_dict().items() if ".lora_A." in n)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"method": {"factors": "gradient"}}, "needs public.labelled = true"),
        ({"method": {"factors": "weights"}, "model": {"quantization": "int8"}}, "which are quantised"),
        ({"adapter": {"kind": "ia3", "rank": 8}}, "treats the two factors of LoRA apart"),
        ({"adapter": {"start": "somewhere"}}, "it has fixed factors of its own"),
        ({"method": {"factors": "svd"}}, "method.factors = 'svd'"),
    ],
)  # fmt: skip
def test_what_it_does_not_go_with_is_told_before_anything_is_trained(experiment, sections, words):
    sections = {**sections, "method": {"name": "fed_sb", **sections.get("method", {})}}
    with pytest.raises(SettingsError) as told:
        experiment(**sections)
    assert any(words in line for line in told.value.problems)
