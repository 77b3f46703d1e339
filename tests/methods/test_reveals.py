"""What replies hold is what each method's file says, and requests go over the work as often as it says."""

from dataclasses import replace

import pytest
import torch

from fedloom.errors import PolicyError
from fedloom.federation.presence import Presence
from fedloom.federation.protocol import Cohort, Replies
from fedloom.methods import METHODS, make_method
from fedloom.methods.bases.answer_grades import GRADES, RIGHT
from fedloom.methods.bases.distribution_matching import CLASSES
from fedloom.methods.bases.logit_wire import COUNTS, INDICES, VALUES
from fedloom.methods.fedamole import PROJECTED, SHARES, TOKENS
from fedloom.methods.fedmoe import USED
from fedloom.methods.regmean import PRODUCTS
from fedloom.methods.scaffold import CONTROL
from fedloom.methods.split import ROWS, TARGETS, SplitSettings
from fedloom.models.request_limits import Allowance
from fedloom.runs.assembly import assemble
from fedloom.runs.partitioning import partition_data
from fedloom.training.synthetic_inputs import SYNTHETIC_INPUTS
from fedloom.wire.messages import Reply, decode
from sampling import every

HOLDS = {
    VALUES: "logits", INDICES: "logits", COUNTS: "logits",
    TOKENS: "embeddings", PROJECTED: "embeddings", SHARES: "embeddings",
    SYNTHETIC_INPUTS: "embeddings", CLASSES: "embeddings",     USED: "expert_probes", "activations": "activations", "gradient": "activations",
    ROWS: "activations", TARGETS: "targets", GRADES: "grades", RIGHT: "grades",
}  # fmt: skip
"""Names of tensors in replies; all others are adapters' or, after ``control/``, control variates."""


@pytest.fixture
def suited(experiment, mixture_folder):
    """Make a small experiment of a method, with settings of it."""

    def make(method, **settings):
        rounds = 2 if method == "hilora" else 1  # which refuses one alone
        sections = {"method": {"name": method, **settings}, "federation": {"rounds": rounds}}
        sections["training"] = {"local_steps": 3}
        if method == "fedamole":
            sections["adapter"] = {"kind": "experts", "experts": 4}
        if method == "fedlease":
            sections["adapter"] = {"kind": "experts", "experts": 3, "router": "linear"}
        if method == "fedmoe":
            sections["adapter"] = {"kind": "submixture", "rank": 8}
            sections["model"] = {"path": str(mixture_folder)}
        if method in ("distillation", "fed_et", "feddm", "split"):
            sections["objective"] = {"name": "classification"}
            sections["data"] = {"source": "builtin:labelled", "builtin_rows": 60}
            sections["public"] = {"rows": 8}
        if method == "fedgrpo":
            sections["objective"] = {"name": "grpo", "group": 3, "max_new_tokens": 3}
            sections["data"] = {"source": "builtin:sums", "builtin_rows": 60}
            sections["public"] = {"rows": 8}
        if method == "split":
            sections["evaluation"] = {"per_client": False}
        return experiment(**sections)

    return make


def held(spec):
    """What a tensor of a reply holds."""
    if spec.name.startswith(f"{CONTROL}/"):
        return {"control_variates"}
    if spec.name.startswith(PRODUCTS):
        return {"inner_products"}
    labels = {"targets"} if spec.name == ROWS and spec.shape[1] == 3 else set()
    return {HOLDS.get(spec.name, "adapters")} | labels


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_method_says_in_its_own_file_what_it_reveals(method):
    kind = METHODS[method][1]
    own = [base for base in kind.__mro__ if base.__module__ == kind.__module__]
    assert any("reveals" in vars(base) for base in own)


@pytest.mark.parametrize("method", every(3, sorted(METHODS.keys() - {"centralised"})))
def test_replies_hold_what_it_says(suited, federate, method):
    found = set()

    def watch(parts):
        exchange = parts.engine.exchange

        def watched(asked):
            found.update(*map(held, asked.reply_schema.tensors))
            return exchange(asked)

        parts.engine.exchange = watched

    played = federate(suited(method), watch, evaluate=True)
    assert found == played.parts.method.reveals


def test_a_centralised_run_has_the_rows(suited):
    assert "rows" in make_method(suited("centralised").method).reveals


def test_labels_at_the_client_are_not_revealed(suited, federate):
    assert "targets" in make_method(SplitSettings()).reveals
    assert "targets" not in make_method(SplitSettings(labels="client")).reveals
    assert "targets" in make_method(SplitSettings()).reveals  # of one object, not of the class
    seen = set()

    def watch(parts):
        exchange = parts.engine.exchange
        parts.engine.exchange = lambda asked: (seen.add(asked.reply_schema), exchange(asked))[1]

    federate(suited("split", labels="client"), watch)
    tensors = {spec.name: spec.shape for schema in seen for spec in schema.tensors}
    assert TARGETS not in tensors and tensors[ROWS][1] == 1  # lengths, no labels


MOST = {
    "fdlora": ({"budget": 3, "batches": 2}, 1), "distillation": ({"server_epochs": 1}, 1), "fed_et": ({"server_epochs": 1}, 1), "feddm": ({"server_steps": 1}, 1),
    "ditto": ({}, 2), "feddpa": ({}, 2), "fedrep": ({}, 2), "pfedme": ({"steps": 3}, 3),
    "fedavg_ft": ({"passes": 4}, 4), "fedpdpo": ({"schedule": "alternating"}, 2),
    "apfl": ({}, 2), "feddat": ({}, 2), "fedala": ({"first_passes": 2}, 3),
    "lora_a2": ({}, 2),
}  # fmt: skip
"""Methods whose requests go over the work more than once: settings, and how often."""


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"centralised", "split"}))
@pytest.mark.slow
def test_no_request_takes_more_batches_than_it_says(suited, federate, method, monkeypatch):
    settings, times = MOST.get(method, ({}, 1))
    own = suited(method, **settings)
    assert make_method(own.method).trainings == times
    taken = []
    begin, step = Allowance.begin, Allowance.step
    monkeypatch.setattr(
        Allowance, "begin", lambda self, **k: (taken.append(0), begin(self, **k))[1]
    )

    def counted(self):
        taken[-1] += bool(taken)
        step(self)

    monkeypatch.setattr(Allowance, "step", counted)
    federate(own)
    # five epochs of one batch of public rows; three mixtures on two batches each; four for a likelihood
    other = {"distillation": 5, "fed_et": 5, "feddm": 4, "fdlora": 6, "fedmap": 3 + 4}.get(
        method, 0
    )
    # fedala: its only round here has nothing to mix; fedgrpo: its own model, two batches of its rows
    first = {"fedala": 3, "fedgrpo": 2}
    assert max(taken) == first.get(method, max(3 * times, other))


@pytest.mark.parametrize(
    ("allowed", "line"), [({"steps": 2}, "max_steps"), ({"seconds": -1.0}, "max_seconds")]
)
@pytest.mark.parametrize(
    "method", ["fedavg", "scaffold", "fedamole", "distillation", "split", "fdlora"]
)
def test_what_is_not_allowed_is_not_computed_and_nothing_is_kept(suited, method, allowed, line):
    experiment = suited(method)
    parts = assemble(experiment, partition_data(experiment))
    engine, told = parts.local, None
    engine.allowance = Allowance(**allowed)
    engine.error_text = lambda error: ";".join(one.line for one in error.refusals)
    cohort = Cohort(1, (0,), Presence.of(engine.sizes()), 1e-3, last=True)
    round = parts.method.round(parts.method.initial_state(parts.initial), cohort)
    exchange = next(round)
    while told is None:
        answer = next(iter(engine.exchange(replace(exchange, requests=only(exchange.requests)))))
        told = answer.error
        if told is None:
            reply = Reply(0, decode(answer.data, exchange.reply_schema))
            exchange = round.send(Replies([reply]))
    assert told == f"policy.{line}"
    engine.finish_round()
    assert not engine.store.flat()


def only(requests):
    return {0: requests[0]}


def test_an_adapter_of_a_larger_rank_than_allowed_is_not_held(experiment):
    small, large = (
        assemble(own, partition_data(own)).model
        for own in (experiment(adapter={"rank": rank}) for rank in (2, 5))
    )
    numbers = sum(tensor.numel() for tensor in small.read().values())
    small.allowance = Allowance(numbers=2 * numbers)
    before = small.read()
    with pytest.raises(PolicyError, match=r"policy\.max_rank"):
        small.write(large.read())
    assert all(torch.equal(tensor, before[name]) for name, tensor in small.read().items())
    small.allowance = Allowance(numbers=3 * numbers)
    small.write(large.read())
    assert sum(tensor.numel() for tensor in small.read().values()) == 5 * numbers // 2


def test_an_allowance_counts():
    own = Allowance(steps=2, numbers=10)
    own.begin()
    own.step(), own.step()
    with pytest.raises(PolicyError, match=r"policy.max_steps: it takes more than 2 batches"):
        own.step()
    own.begin(going_on=True)
    with pytest.raises(PolicyError):
        own.step()
    own.begin()
    own.step(), own.hold(10)
    with pytest.raises(PolicyError, match=r"policy.max_rank: an adapter of 11 numbers"):
        own.hold(11)
    late = Allowance(seconds=-1)
    late.check()  # no request has begun
    late.begin()
    with pytest.raises(PolicyError, match=r"policy.max_seconds"):
        late.check()
