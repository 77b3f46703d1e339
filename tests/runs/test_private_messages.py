"""What travels under [privacy], of every method: but for the noisy sums, no bit of it depends on rows.

Two runs are made with other training rows at every client, as many as before. Where clipped sums lose what
rows add to them (and nothing else is changed), noise is all that is left of the rows: whatever still
differs in a message or in the released adapter has come past the mechanism, and is not accounted.

Where clients add the noise, the keys of their sums are drawn alike in both runs, so that each bit of
what they send can be compared.
"""

import itertools
import json
import uuid
from dataclasses import replace

import numpy as np
import pytest

from fedloom.data.builtin import builtin_examples
from fedloom.errors import PluginError, SettingsError
from fedloom.federation import secure_exchange
from fedloom.federation.secure_exchange import MASKED, MESSAGE, PROTOCOL
from fedloom.methods import METHODS, make_method
from fedloom.methods.declaration import yes
from fedloom.privacy import client_level
from fedloom.privacy.distributed_noise import NoiseShares
from fedloom.runs.observers import Silent
from fedloom.runs.run import run_experiment
from fedloom.training import row_privacy
from fedloom.wire.messages import decode
from sampling import every

UNITS = {
    "client": {"unit": "client", "delta": 1e-2, "clip": 0.1},
    "row": {"unit": "row", "delta": 1e-3},
    "clients' noise": {
        "unit": "client",
        "noise": "distributed",
        "secure_aggregation": True,
        "delta": 1e-2,
        "clip": 0.1,
    },
}
HELD = {
    "client": ("client_privacy",),
    "row": ("row_privacy",),
    "clients' noise": ("client_privacy", "secure_aggregation"),
}
"""By unit (or who adds the noise), what a method must declare."""


def is_able(name, unit):
    kind = METHODS[name][1]
    able = all(getattr(kind.declares, own).holds for own in HELD[unit])
    if unit == "row":
        return able and repeats(name) == 1
    return able and not (unit == "clients' noise" and kind.own_models)


def repeats(name):
    return make_method(METHODS[name][0]()).repeats


ABLE = {unit: sorted(name for name in METHODS if is_able(name, unit)) for unit in UNITS}
SUMMED = sorted(
    name
    for name, (_, kind) in METHODS.items()
    if kind.declares.secure_aggregation.holds and not kind.own_models
)


HELD_OUT = {"held_out"}
"""How many rows a model was judged on, none of which is trained on."""


class OtherRows:
    """Takes part in a run: gives clients other rows of the same kind, and keeps what passes."""

    def __init__(self, seed):
        self.seed, self.messages, self.names = seed, [], set()

    def planted(self, division):
        kind = next(iter(division.train.values()))[0]
        source = {"Labelled": "labelled", "Preference": "preferences"}[type(kind).__name__]
        drawn = builtin_examples(source, 400, np.random.default_rng(self.seed))
        drawn = iter(
            [own for own in drawn if getattr(own, "label", None) in (None, *division.classes)]
        )
        train = {
            client: [replace(next(drawn), row=own.row) for own in rows]
            for client, rows in division.train.items()
        }
        return replace(division, train=train)

    def intercepting(self, parts):
        exchange = parts.engine.exchange

        def watched(asked):
            for client, data in asked.requests.items():
                self.messages.append(("down", asked.round, asked.action, client, data))
            for answer in exchange(asked):
                if answer.error is not None:
                    raise PluginError(answer.error)
                self.messages.append(("up", asked.round, asked.action, answer.client, answer.data))
                payload = decode(answer.data, asked.reply_schema)
                for kind in ("tensors", "numbers", "metrics"):
                    names = getattr(payload, kind)
                    masked = asked.masking is not None and asked.action not in PROTOCOL
                    self.names.update((asked.action, masked, kind, name) for name in names)
                yield answer

        parts.engine.exchange = watched
        return parts.engine


class Counted:
    """Stands for the entropy of a run's id and of the keys of its sums: the same in each run."""

    def __init__(self):
        self.numbers = itertools.count(1)

    def urandom(self, n):
        return next(self.numbers).to_bytes(n, "big")

    def uuid4(self):
        return uuid.UUID(int=next(self.numbers))


@pytest.fixture
def played(experiment, tmp_path, monkeypatch):
    """Run two rounds of a method with rows of a seed; return what passed, and the released adapter."""

    def play(method, privacy, seed):
        monkeypatch.setattr(secure_exchange, "os", drawn := Counted())
        monkeypatch.setattr("fedloom.runs.run.uuid", drawn)
        folder = tmp_path / f"{method} {seed}"
        sections = {
            "method": {"name": method},
            "federation": {"rounds": 2, "clients": 3},
            "training": {"local_steps": 2, "batch_size": 4},
            "data": {"builtin_rows": 40},
            "evaluation": {"samples": 0, "max_examples": 2, "per_client": False, "every": 2},
            "privacy": {"noise_multiplier": 1.0, "accountant": "rdp", "seeded": True, **privacy},
            "output": {"folder": str(folder), "verify": False},
        }
        if "unit" not in privacy:
            sections["privacy"] = privacy
        if method in ("distillation", "fed_et", "feddm"):
            sections["objective"] = {"name": "classification"}
            sections["data"] = {"source": "builtin:labelled", "builtin_rows": 60}
            sections["public"] = {"rows": 8}
        watch = OtherRows(seed)
        run_experiment(experiment(**sections), observer=Silent(), auditor=watch)
        adapter = folder / "adapter" / "adapter_model.safetensors"
        watch.released = adapter.read_bytes() if adapter.exists() else b""
        watch.rounds = (folder / "rounds.jsonl").read_text().splitlines()
        return watch

    return play


def without_rows(unit, monkeypatch):
    """Have clipped sums lose what rows add to them."""
    if unit == "clients' noise":
        monkeypatch.setattr(
            NoiseShares, "rounded", lambda self, change, rng: np.zeros(len(change), np.int64)
        )
    elif unit == "client":
        monkeypatch.setattr(
            client_level.ClippedSum, "add", lambda self, update: [*self._changes(update)]
        )
    else:
        monkeypatch.setattr(row_privacy.ClippedSum, "_clipped", lambda self, found: None)


def shown(watch, unit):
    """What those are shown whom the unit is hidden from: but for noise of the server every message."""
    messages = [own for own in watch.messages if unit != "client" or own[0] == "down"]
    records = [json.loads(line) for line in watch.rounds]
    scores = [
        [own.get(name) for name in ("train", "client_train", "details", "evaluation")]
        for own in records
    ]
    return messages, watch.released, scores


CASES = [(unit, name) for unit in UNITS for name in ABLE[unit]]


@pytest.mark.parametrize("case", every(-(-len(CASES) // 2), CASES))
def test_but_for_noisy_sums_nothing_depends_on_rows(played, monkeypatch, case):
    unit, method = case
    with monkeypatch.context() as patched:
        without_rows(unit, patched)
        one, other = (played(method, UNITS[unit], seed) for seed in (1, 2))
    assert one.messages and one.names == other.names
    for mine, others in zip(*(shown(own, unit)[0] for own in (one, other)), strict=True):
        assert mine == others, f"{mine[:4]} tells of the rows beside the noise"
    assert shown(one, unit) == shown(other, unit)
    numbers = {name for _, _, kind, name in one.names if kind == "numbers"}
    if unit == "row":  # how many rows there are is stated to be known
        assert numbers <= {"examples", *HELD_OUT}
    if unit == "clients' noise":
        assert_summed_alone(one)


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["row", "clients' noise"])
def test_with_rows_in_the_sums_everything_depends_on_them(played, unit):
    """Or the test above would pass whatever is sent."""
    one, other = (played("fedavg", UNITS[unit], seed) for seed in (1, 2))
    assert one.messages != other.messages and one.released != other.released


@pytest.mark.slow
def test_a_metric_of_rows_is_found(played, monkeypatch):
    """Here how many tokens a client's rows have, where nothing is said of a training."""
    without_rows("row", monkeypatch)
    train = row_privacy.RowPrivacy.train

    def telling(self, training):
        tokens = float(len(training.share.tokens.tokens))
        return replace(train(self, training), metrics={"loss": tokens})

    monkeypatch.setattr(row_privacy.RowPrivacy, "train", telling)
    one, other = (played("fedavg", UNITS["row"], seed) for seed in (1, 2))
    assert shown(one, "row") != shown(other, "row")


@pytest.mark.slow
def test_a_weight_of_rows_in_a_sum_is_found(played, monkeypatch):
    """Here how long a client's change is before it is clipped, in the place of its weight of 1."""
    without_rows("clients' noise", monkeypatch)
    plain = secure_exchange.noisy_words

    def weighed(shares, tensors, origins, *more):
        words = plain(shares, tensors, origins, *more)
        change = sum(float((own - origins[name]).norm()) for name, own in tensors.items())
        words[0] += int(1e6 * change)
        return words

    monkeypatch.setattr(secure_exchange, "noisy_words", weighed)
    monkeypatch.setattr(secure_exchange, "is_possible", lambda *asked: True)
    one, other = (played("fedavg", UNITS["clients' noise"], seed) for seed in (1, 2))
    assert one.messages != other.messages and one.released == other.released


@pytest.mark.slow
@pytest.mark.parametrize(("unit", "method"), [("client", "scaffold"), ("row", "fdlora")])
def test_a_method_that_is_refused_would_tell_of_rows(played, monkeypatch, unit, method):
    kind = METHODS[method][1]
    claims = dict.fromkeys(HELD[unit], yes("for once"))
    monkeypatch.setattr(kind, "declares", replace(kind.declares, **claims))
    without_rows(unit, monkeypatch)
    try:
        one, other = (played(method, UNITS[unit], seed) for seed in (1, 2))
    except PluginError:
        return  # it was stopped at what it wanted to send
    assert shown(one, unit) != shown(other, unit)


@pytest.mark.parametrize("unit", UNITS)
def test_every_method_is_accounted_or_refused_by_its_name(experiment, unit):
    for name in METHODS.keys() - set(ABLE[unit]):
        with pytest.raises(SettingsError) as told:
            experiment(
                method={"name": name},
                privacy={"noise_multiplier": 1.0, **UNITS[unit]},
            )
        assert any(f"method.name = {name!r}" in line for line in told.value.problems), name


@pytest.mark.parametrize("method", every(len(SUMMED), SUMMED))
def test_under_secure_aggregation_answers_are_masked_whole(played, method):
    """Of a training nothing is beside the masked integers: no number, no metric, no tensor."""
    assert_summed_alone(played(method, {"secure_aggregation": True}, 1))


def assert_summed_alone(watch):
    answers = {(kind, name) for _, masked, kind, name in watch.names if masked}
    beside = {(action, kind, name) for action, masked, kind, name in watch.names if not masked}
    assert answers == {("tensors", MASKED)}
    assert {action for action, *_ in beside} <= PROTOCOL
    assert {(kind, name) for _, kind, name in beside} == {("tensors", MESSAGE)}
