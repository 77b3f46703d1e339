"""What a client takes over from a server's experiment: nothing that is not on the list, in the end nothing
that chooses rows, and no number above its bounds."""

import datetime
import itertools
import types
import typing
from dataclasses import fields, replace
from pathlib import Path

import pytest

from fedloom.data.public import PublicSettings
from fedloom.data.sources import TEMPLATE_DATE
from fedloom.deployment.client_file import OwnFile
from fedloom.deployment.error_report import LINES, text_for_server
from fedloom.deployment.policy import REVEALING, PolicySettings, PrivacyPolicySettings
from fedloom.deployment.policy_enforcement import (
    DECIDED,
    LEFT,
    LONGEST,
    METHODS_OWN,
    MOST,
    TAKEN,
    examine,
    fewest_steps,
    leaves,
    open_methods,
    permitted,
    require_steps,
)
from fedloom.errors import PolicyError, SettingsError
from fedloom.experiment.experiment import SECTIONS, Experiment
from fedloom.methods import METHODS
from fedloom.objectives import OBJECTIVES
from fedloom.privacy.settings import PrivacySettings
from fedloom.settings.schema import Settings, descriptions
from loopback import OPEN
from sampling import tries

ROOT = Path(__file__).parents[2]
SHARED = {"data": {"source": "builtin:preferences", "share": "experiment"}}
OWN = {"data": {"source": "own.jsonl", "kind": "preference"}}


@pytest.fixture
def own(tmp_path):
    """Make a client's file of a table."""
    from fedloom.settings.toml import write_toml

    def make(table, **policy):
        path = tmp_path / "my.toml"
        path.write_text(write_toml({**table, "policy": {**table.get("policy", {}), **policy}}))
        return OwnFile.read(path)

    return make


def ask(own, client=0, classes=0, **sections):
    return examine(Experiment.from_table(sections).to_toml(), own, client, classes)


def lines(examined):
    return sorted(one.line for one in examined.refusals)


# Every setting there is


def settings_within(annotation):
    """The classes of settings that a field holds, alone or in a list, a union or a table."""
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    inner = typing.get_args(annotation)
    return list(itertools.chain.from_iterable(map(settings_within, inner)))


def names_of(kind, section):
    """The names of all settings of a section, those of sections within it under ``*``."""
    hints = typing.get_type_hints(kind)
    for name in kind.model_fields:
        full = f"{section}.{name}"
        yield full
        if full not in LEFT:
            for inner in settings_within(hints[name]):
                yield from names_of(inner, f"{full}.*")


def every_setting():
    for section, choice in SECTIONS.items():
        if isinstance(choice, type):
            yield from names_of(choice, section)
            continue
        for name, (kind, _) in choice.items():
            own = names_of(kind, f"{section}.{name}")
            yield from (full for full in own if not full.endswith(".name"))


def test_every_setting_of_an_experiment_is_taken_bounded_decided_or_left():
    known = [*TAKEN, *MOST, *DECIDED, *LEFT, *METHODS_OWN]
    assert sorted(every_setting()) == sorted(
        known
    )  # none missing, none twice, none that is not there
    assert {name.split(".")[0] for name in known} == SECTIONS.keys()
    assert {field.name for field in fields(Experiment)} == SECTIONS.keys() | {"name", "notes"}


def test_the_list_sees_new_settings(monkeypatch):
    class New(Settings):
        path: str = ""

    class More(PublicSettings):
        deep: dict[str, New | None] | None = None

    monkeypatch.setitem(SECTIONS, "public", More)
    assert set(every_setting()) - {*TAKEN, *MOST, *DECIDED, *LEFT, *METHODS_OWN} == {
        "public.deep",
        "public.deep.*.path",
    }


def test_every_bound_is_a_line_of_the_policy():
    policy = PolicySettings.model_fields
    bounds = {name for name in policy if name.startswith("max_")}
    beyond = {"max_seconds", "max_bytes", "max_runs_a_day", "max_rounds_a_day"}  # asked for later
    assert {*MOST.values(), *METHODS_OWN.values()} - {""} == bounds - beyond
    assert descriptions(PolicySettings).keys() == policy.keys()  # what `fedloom client check` says
    others = {"objectives", "methods", "rewards", "models", "privacy", "approve"}
    assert set(REVEALING) | bounds | others == policy.keys()


def test_what_a_method_can_reveal_has_a_line():
    from fedloom.methods.contract.method import Reveal

    said = set(typing.get_args(Reveal)) - {"adapters", "control_variates", "rows"}
    assert said == set(REVEALING) - {"public_rows"}


# Rows


HOSTILE_ROWS = [
    {"domains": {"a": {"source": "/etc/passwd.jsonl"}}},
    {"template": "{ssn}"},
    {"columns": {"prompt": "ssn"}},
    {"only": {"name": ["Miller"]}},
    {"max_rows": 1},
    {"split": "secret", "subset": "other", "data_dir": "/data"},
    {"answers_between": ";"},
    {"continuations": {"chosen": "a", "rejected": "b"}},
    {"test_split": "test"},
    {"max_bad_share": 1.0, "incomplete_pairs": "feedback"},
    {"ambiguous": "keep", "control_tokens": "control"},
    {"source": "/home/else.jsonl"},
    {"source": ["/home/a.jsonl", "/home/b.jsonl"]},
]


@pytest.mark.parametrize("hostile", HOSTILE_ROWS, ids=lambda table: next(iter(table)))
def test_nothing_about_rows_comes_from_the_server(own, hostile):
    file = own({**OWN, "data": {**OWN["data"], "columns": {"prompt": "question"}, "max_rows": 50}})
    domains = {"source": "builtin:preferences"} if "domains" in hostile else {}
    asked = {"source": "rows.jsonl", "kind": "preference", "max_length": 99, **domains, **hostile}
    objective = {"name": "kto"} if "incomplete_pairs" in hostile else {}
    if "domains" in hostile:
        del asked["source"]
    found = ask(file, data=asked, objective=objective)
    assert not found.refusals
    named = {
        "source": "own.jsonl",
        "kind": "preference",
        "columns": {"prompt": "question"},
        "max_rows": 50,
    }
    everybodys = {"max_length": 99, "train_on": "all_answers"}
    left = {**Experiment().data.model_dump(), **named, **everybodys}
    assert found.experiment.data.model_dump() == left
    assert any(name.startswith("data.") for name in found.set_aside)


def test_a_client_without_rows_offers_none(own):
    found = ask(own({}))
    assert lines(found) == ["data"] and found.experiment is None
    assert text_for_server(PolicyError(*found.refusals)) == "data: this client offers no rows"


def test_a_client_reads_its_own_rows_whatever_the_experiment_names(own):
    found = ask(
        own(OWN), partition={"kind": "column", "column": "ssn", "client_test_fraction": 0.2}
    )
    assert not found.refusals and found.experiment.data.source == "own.jsonl"
    assert (found.experiment.partition.kind, found.experiment.partition.column) == ("iid", None)
    assert found.experiment.partition.client_test_fraction == 0.2


def test_the_kind_of_rows_and_their_choices_must_agree(own):
    asked = {"data": {"source": "x.jsonl", "kind": "instruction"}, "objective": {"name": "sft"}}
    assert lines(ask(own(OWN), **asked)) == ["data.kind"]
    file = own({"data": {"source": "x.jsonl", "kind": "instruction", "choices": ["no", "yes"]}})
    assert lines(ask(file, **asked)) == ["data.choices"]
    asked["data"]["choices"] = ["no", "yes"]
    assert not ask(file, **asked).refusals


def test_what_the_clients_file_sets_stands_before_the_numbers_of_the_experiment(own):
    file = own({"data": {**SHARED["data"], "max_length": 32, "test_fraction": 0.5}})
    found = ask(file, data={"max_length": 64, "test_fraction": 0.3, "builtin_rows": 70}).experiment
    assert (found.data.max_length, found.data.test_fraction, found.data.builtin_rows) == (
        32,
        0.5,
        70,
    )
    whole = ask(own(OWN), data={"test_fraction": 0.3, "builtin_rows": 70}).experiment
    assert (whole.data.test_fraction, whole.data.builtin_rows) == (0.2, 1600)


@pytest.mark.parametrize(
    "said",
    [
        {"source": "a.jsonl", "continuations": {"chosen": "pos", "rejected": "neg", "words": 5}},
        {
            "domains": {
                "a": {"source": "a.jsonl", "only": {"x": ["1"]}},
                "b": {"source": ["c", "d"]},
            }
        },
        {
            "source": "all.jsonl",
            "share": "experiment",
            "test_source": "test.jsonl",
            "only": {"x": ["1"]},
        },
    ],
)
def test_everything_about_reading_is_the_clients_own_to_say(own, said):
    file = own({"data": {"kind": "preference", **said}})
    asked = {"source": "x.jsonl", "kind": "preference", "max_length": 64, "test_fraction": 0.4}
    data = ask(file, data=asked).experiment.data.model_dump(exclude_unset=True)
    taken = {"max_length": 64, "train_on": "all_answers", "template_date": TEMPLATE_DATE}
    if said.get("share"):
        taken |= {"builtin_rows": 1600, "test_fraction": 0.4, "ambiguous": "drop"}
    said = {name: value for name, value in said.items() if name != "share"}
    assert data == {"kind": "preference", **taken, **said}


def test_what_is_trained_on_of_a_row_is_the_experiments(own):
    """A client that says nothing of it trains as a simulation does; one that says otherwise refuses."""
    asked = {"source": "x.jsonl", "kind": "preference", "train_on": "last_answer"}
    asked["template_date"] = datetime.date(2025, 2, 3)
    data = ask(own(OWN), data=asked).experiment.data
    assert data.train_on == "last_answer" and str(data.template_date) == "2025-02-03"
    same = {"data": {**OWN["data"], "train_on": "last_answer"}}
    assert not ask(own(same), data=asked).refusals
    other = {"data": {**OWN["data"], "train_on": "completion", "template_date": TEMPLATE_DATE}}
    found = ask(own(other), data=asked)
    assert [(one.line, one.reason) for one in found.refusals] == [
        ("data.train_on", "'last_answer' is requested, here it is 'completion'"),
        ("data.template_date", "'2025-02-03' is requested, here it is '2024-07-26'"),
    ]
    assert text_for_server(PolicyError(*found.refusals)) == (
        "data.train_on: the experiment's setting differs from this client's; "
        "data.template_date: the experiment's setting differs from this client's"
    )


def test_control_tokens_in_a_clients_rows_are_its_own_to_say(own):
    for asked, here in (("control", "text"), ("text", "control")):
        file = own({"data": {**OWN["data"], "control_tokens": here}})
        data = {"source": "x.jsonl", "kind": "preference", "control_tokens": asked}
        assert ask(file, data=data).experiment.data.control_tokens == here
    assert ask(own(OWN), data=data | {"control_tokens": "control"}).experiment.data == (
        ask(own(OWN), data=data).experiment.data
    )


def test_the_share_of_built_in_rows_is_the_experiments(own):
    asked = Experiment.from_table(
        {
            "data": {"builtin_rows": 90, "max_length": 64},
            "partition": {"kind": "dirichlet", "column": "domain", "alpha": 0.3},
            "federation": {"clients": 5, "seed": 3},
        }
    )
    assert examine(asked.to_toml(), own(SHARED), 0).experiment == asked
    other = {"data": {"source": "builtin:opposed", "share": "experiment"}}
    assert lines(examine(asked.to_toml(), own(other), 0)) == ["data.source"]


# Privacy


HIDDEN = {"unit": "row", "delta": 1e-3, "noise_multiplier": 1.0}
UNJUDGED = {"evaluation": {"per_client": False}}
DEMANDS = {
    "row": {"require": "row"},
    "budget": {"max_epsilon": 8.0, "delta": 1e-5},
    "patient": {"require": "row", "column": "patient"},
    "client": {"require": "client"},
    "share": {"require": "client", "distributed_noise": True, "trust_first_use": True},
}
OF_CLIENTS = {**HIDDEN, "unit": "client"}
ADDED = {**OF_CLIENTS, "noise": "distributed", "secure_aggregation": True}
THREE = {"federation": {"clients": 3}}


@pytest.mark.parametrize(
    ("demand", "asked", "said"),
    [
        ("row", {"privacy": HIDDEN, **UNJUDGED}, None),
        ("budget", {"privacy": HIDDEN, **UNJUDGED}, None),
        ("client", {"privacy": HIDDEN}, None),
        ("client", {"privacy": OF_CLIENTS}, None),
        ("patient", {"privacy": {**HIDDEN, "column": "patient"}, **UNJUDGED}, None),
        ("share", {"privacy": HIDDEN}, None),
        ("share", {"privacy": ADDED, **UNJUDGED, **THREE}, None),
        ("share", {"privacy": OF_CLIENTS}, 'privacy.noise is "central": the server would see'),
        ("share", {}, "privacy.unit is missing: the experiment adds no noise at all"),
        ("share", {"privacy": {**ADDED, "seeded": True}, **UNJUDGED, **THREE}, "subtracts the noise"),
        ("row", UNJUDGED, 'privacy.unit is missing, here it must be "row"'),
        ("budget", UNJUDGED, "privacy.unit is missing"),
        ("client", {}, "privacy.unit is missing: the experiment adds no noise at all"),
        ("row", {"privacy": OF_CLIENTS, **UNJUDGED}, "privacy.unit is 'client'"),
        ("row", {"privacy": {**HIDDEN, "seeded": True}, **UNJUDGED}, "subtracts the noise"),
        ("client", {"privacy": {**OF_CLIENTS, "seeded": True}}, "subtracts the noise"),
        ("budget", {"privacy": {**HIDDEN, "noise_multiplier": 0.0}, **UNJUDGED}, "adds no noise"),
        ("row", {"privacy": HIDDEN}, "evaluation.per_client = true sends exact scores"),
        ("patient", {"privacy": HIDDEN, **UNJUDGED}, "privacy.column = None is requested"),
        ("row", {"privacy": {**HIDDEN, "column": "x"}, **UNJUDGED}, "here it is no column"),
    ],
)  # fmt: skip
def test_what_hides_less_than_the_client_demands_is_refused(own, demand, asked, said):
    found = ask(own(OWN, privacy=DEMANDS[demand]), **asked)
    if said is None:
        assert not found.refusals
        return
    (refusal,) = found.refusals
    assert said in refusal.reason and refusal.line in LINES and found.experiment is None
    assert text_for_server(PolicyError(refusal)) == f"{refusal.line}: {LINES[refusal.line]}"


def test_how_rows_are_hidden_here_is_taken_over_and_what_the_server_adds_is_not(own):
    asked = {**HIDDEN, "clip": 0.5, "accountant": "rdp", "column": "patient"}
    taken = ask(own(OWN), privacy=asked, **UNJUDGED).experiment.privacy
    assert taken.model_dump(exclude_unset=True) == PrivacySettings(
        **asked, target_epsilon=None, seeded=False
    ).model_dump(exclude_unset=True)
    assert ask(own(OWN), privacy=OF_CLIENTS).experiment.privacy == PrivacySettings()
    more = {
        **ADDED,
        "colluding": 0,
        "sum_bits": 20,
        "sum_rounding": "nearest",
        "min_separation": 1,
    }
    known = own(OWN, privacy={"trust_first_use": True})
    share = ask(
        known, privacy={**more, "accountant": "rdp"}, **UNJUDGED, **THREE
    ).experiment.privacy
    assert share == PrivacySettings(**more)


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ({"max_epsilon": 8.0}, "policy.privacy.max_epsilon needs policy.privacy.delta"),
        ({"delta": 1e-5}, "policy.privacy.delta needs policy.privacy.max_epsilon"),
        (
            {"max_epsilon": 8.0, "delta": 1e-5, "require": "client"},
            "which no budget here can count",
        ),
        ({"column": "patient"}, 'goes with require = "row" or max_epsilon'),
        ({"distributed_noise": True}, 'it goes with policy.privacy.require = "client"'),
        ({"max_epsilon": 0.0, "delta": 1e-5}, "policy.privacy.max_epsilon = 0.0: must be greater"),
        ({"requires": "row"}, "policy.privacy.requires: unknown key; did you mean 'require'"),
        ({"require": "rows"}, "policy.privacy.require = 'rows': did you mean 'row'"),
    ],
)
def test_a_demand_that_contradicts_itself_is_said(own, policy, said):
    with pytest.raises(SettingsError) as wrong:
        own(OWN, privacy=policy)
    assert said in str(wrong.value)


# Public rows


def distilling(**public):
    return {
        "method": {"name": "distillation"},
        "objective": {"name": "classification"},
        "data": {"source": "builtin:labelled"},
        "public": public,
    }


LABELLED = {
    "data": {"source": "builtin:labelled", "share": "experiment"},
    "policy": {"logits": True},
}


def test_built_in_public_rows_need_no_file(own):
    for public in ({"rows": 8}, {"source": "builtin:labelled", "rows": 8}):
        found = ask(own(LABELLED), **distilling(**public))
        assert not found.refusals and found.experiment.public.rows == 8
        assert found.experiment.public.source == public.get("source")


def test_public_rows_of_a_file_are_those_that_the_client_names(own):
    hostile = distilling(
        source="/home/secret.jsonl",
        kind="labelled",
        template="{ssn}",
        columns={"text": "ssn"},
        rows=8,
    )
    assert lines(ask(own(LABELLED), **hostile)) == ["policy.public_rows"]
    named = {**LABELLED, "public": {"source": "all.jsonl", "columns": {"text": "said"}}}
    assert lines(ask(own(named), **hostile)) == ["policy.public_rows"]
    found = ask(own(named, public_rows=True), **hostile).experiment.public
    expected = {"source": "all.jsonl", "columns": {"text": "said"}, "rows": 8}
    assert found == PublicSettings(**expected)
    assert lines(ask(own(LABELLED, public_rows=True), **hostile)) == ["policy.public_rows"]


def test_public_rows_are_read_as_the_experiment_says(own):
    """Whatever the client's file says of its own rows: positions are the same for all."""
    read = {"ambiguous": "keep", "control_tokens": "control", "max_length": 64}
    file = {**LABELLED, "public": {"source": "all.jsonl"}}
    asked = distilling(source="all.jsonl", rows=8)
    asked["data"] = {"source": "clients", "kind": "labelled", "test_source": "t.jsonl", **read}
    private = {"source": "own.jsonl", "kind": "labelled", "max_length": 32}
    open_ = {"logits": True, "public_rows": True}
    examined = ask(own({**file, "data": private}, **open_), **asked)
    found = examined.experiment
    assert found.public.model_dump(include=set(read)) == read
    assert {"data.max_length", "data.control_tokens"} <= set(examined.set_aside)
    assert not {f"public.{name}" for name in read} & set(examined.set_aside)
    assert (found.data.max_length, found.data.control_tokens) == (32, "text")
    default = {name: value for name, value in asked["data"].items() if name not in read}
    found = ask(own({**file, "data": private}, **open_), **{**asked, "data": default}).experiment
    assert found.public.max_length == 1024  # which is the server's, of a file that does not say it
    asked["public"] |= {"max_length": 16, "ambiguous": "drop"}
    found = ask(own({**file, "data": private}, **open_), **asked).experiment.public
    assert (found.max_length, found.ambiguous, found.control_tokens) == (16, "drop", "control")
    asked["public"]["max_length"] = 10**6
    refused = ask(own({**file, "data": private}, **open_), **asked)
    assert lines(refused) == ["policy.max_tokens"]


def test_a_clients_own_rows_never_become_public(own):
    file = own({"data": {"source": "own.jsonl", "kind": "labelled"}}, logits=True, public_rows=True)
    hostile = distilling(rows=8)  # in a simulation these are taken out of everybody's rows
    assert lines(ask(file, **hostile)) == ["policy.public_rows"]


def test_public_rows_are_of_no_interest_to_other_methods(own):
    found = ask(own(SHARED), public={"source": "/home/secret.jsonl", "kind": "labelled"})
    assert not found.refusals and found.experiment.public == PublicSettings()


# Models


@pytest.mark.parametrize(
    ("asked", "allowed", "refused"),
    [
        ({"path": "tiny"}, [], False),
        ({"path": "/etc/passwd"}, [], True),
        ({"path": "a/b"}, ["a/b"], False),
        ({"path": "a/b", "revision": "refs/pr/1"}, ["a/b"], True),
        ({"path": "a/b", "revision": "refs/pr/1"}, ["a/b@refs/pr/1"], False),
        ({"path": "a/b"}, ["a/b@main"], True),
        ({"path": "a/../a/b"}, ["a/b"], True),
    ],
)
def test_models_that_may_be_loaded(own, asked, allowed, refused):
    found = ask(own(SHARED, models=allowed), model=asked)
    assert lines(found) == ["policy.models"] * refused
    if not refused:
        assert found.experiment.model.path == asked["path"]


def test_the_clients_own_model_stands_for_the_experiments(own):
    file = own({**SHARED, "model": {"path": "/models/own"}})
    for path in ("a/b", "/etc/passwd", "/nowhere"):
        found = ask(file, model={"path": path, "revision": "x", "quantization": "int8"})
        assert not found.refusals
        model = found.experiment.model
        assert (model.path, model.revision, model.quantization) == ("/models/own", None, "int8")


def test_models_of_groups_and_servers_are_checked_where_they_are_loaded(own):
    groups = {"big": {"clients": [1], "model": "big/one", "rank": 4}, "other": {"clients": [0]}}
    alone = {"method": {"name": "local_only"}, "clients": {"groups": groups}}
    assert lines(ask(own(SHARED), client=1, **alone)) == ["policy.models"]
    found = ask(own(SHARED), client=0, **alone)
    assert not found.refusals and set(found.experiment.clients.groups) == {"other"}
    public = distilling(rows=8)
    public["method"]["server_model"] = "big/server"
    public["clients"] = {"groups": groups}
    assert lines(ask(own(LABELLED), **public)) == ["policy.models"] * 2
    found = ask(own(LABELLED, models=["big/one", "big/server"]), **public)
    assert not found.refusals and found.experiment == Experiment.from_table(public)


# What may be asked for


def test_by_default_replies_hold_adapters_and_control_variates(own):
    allowed = set(open_methods(own(SHARED)))
    closed = {
        "centralised",
        "fedamole",
        "fedmoe",
        "regmean",
        "distillation",
        "fed_et",
        "fedgrpo",
        "feddm",
        "split",
    }
    assert allowed == METHODS.keys() - closed
    assert set(open_methods(own(SHARED, **OPEN))) == METHODS.keys() - {"centralised"}
    assert set(open_methods(own(SHARED, activations=True))) - allowed == {"split"}
    assert open_methods(own(SHARED, methods=["fedavg", "split"])) == ["fedavg"]


ADAPTERS = {
    "fedamole": {"kind": "experts"},
    "fedlease": {"kind": "experts", "router": "linear"},
    "fedmoe": {"kind": "submixture"},
}


@pytest.mark.parametrize("method", sorted(METHODS))
def test_each_method_needs_the_lines_that_it_says(own, method):
    asked = {"method": {"name": method}, "adapter": ADAPTERS.get(method, {})}
    table = SHARED
    if method in ("distillation", "fed_et", "feddm", "split"):
        asked |= distilling(
            rows=8,
        ) | {"method": {"name": method}}
        table = {"data": LABELLED["data"]}
    if method == "fedgrpo":
        asked |= {
            "objective": {"name": "grpo"},
            "data": {"source": "builtin:sums"},
            "public": {"rows": 8},
        }
        table = {"data": {"source": "builtin:sums", "share": "experiment"}}
    if method == "fedamole":
        asked["federation"] = {"clients": 4}
    needed = {
        "fedamole": ["embeddings"], "fedmoe": ["expert_probes"], "regmean": ["inner_products"], "distillation": ["logits"], "fed_et": ["logits"], "feddm": ["embeddings"], "fedgrpo": ["grades"],
        "split": ["activations", "targets"], "centralised": ["methods"],
    }.get(method, [])  # fmt: skip
    assert lines(ask(own(table), **asked)) == [f"policy.{name}" for name in needed]
    for name in needed:
        others = {other: True for other in REVEALING if other != name}
        assert f"policy.{name}" in lines(ask(own(table, **others), **asked))
    if method != "centralised":
        assert not ask(own(table, **OPEN), **asked).refusals
    assert "policy.methods" in lines(ask(own(table, **OPEN, methods=["none"]), **asked))


def test_labels_at_the_client_need_no_targets(own):
    asked = distilling() | {"method": {"name": "split", "labels": "client"}, "public": {}}
    assert not ask(own({"data": LABELLED["data"]}, activations=True), **asked).refusals


def test_first_tokens_of_rows_need_a_line_of_their_own(own):
    asked = distilling(rows=8) | {"method": {"name": "feddm", "start": "rows"}}
    table = {"data": LABELLED["data"]}
    assert lines(ask(own(table, embeddings=True), **asked)) == ["policy.first_tokens"]
    assert not ask(own(table, embeddings=True, first_tokens=True), **asked).refusals


def test_objectives_may_be_listed(own):
    assert lines(ask(own(SHARED, objectives=["kto"]))) == ["policy.objectives"]
    assert not ask(own(SHARED, objectives=["kto", "dpo"])).refusals


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("adapter.rank", 10**7), ("federation.clients", 10**8), ("training.batch_size", 10**6),
        ("data.max_length", 10**6), ("data.builtin_rows", 10**9), ("evaluation.batch_size", 10**6),
        ("evaluation.max_length", 10**6), ("evaluation.max_new_tokens", 10**6),
        ("output.checkpoint_every", 10**6),
    ],
)  # fmt: skip
def test_numbers_above_their_bounds_are_refused_by_the_line_alone(own, name, value):
    section, key = name.split(".")
    found = ask(own(SHARED), **{section: {key: value}})
    assert lines(found) == [f"policy.{MOST[name]}"]
    text = text_for_server(PolicyError(*found.refusals))
    assert text == f"policy.{MOST[name]}: the experiment asks for more than this client allows"
    most = getattr(PolicySettings(), MOST[name])
    assert not lines(ask(own(SHARED), **{section: {key: most}}))  # of the very bound


def test_steps_of_newcomers_are_bounded_for_those_who_are(own):
    asked = {"clients": {"newcomers": [2], "newcomer_steps": 10**9}}
    assert lines(ask(own(SHARED), client=2, **asked)) == ["policy.max_steps"]
    assert not ask(own(SHARED), client=1, **asked).refusals
    assert not ask(own(SHARED, max_steps=5)).refusals  # there are none, whatever the default


@pytest.mark.parametrize(
    ("method", "key", "line"),
    [
        ("fedavg_ft", "passes", "max_steps"), ("pfedme", "steps", "max_steps"),
        ("fdlora", "budget", "max_steps"), ("fdlora", "batches", "max_steps"),
        ("fedala", "first_passes", "max_steps"),
        ("fedmap", "batches", "max_steps"),
        ("fedpdpo", "bottleneck", "max_width"), ("fedpdpo", "head_rank", "max_rank"),
        ("fedper", "head_rank", "max_rank"), ("fedrep", "head_rank", "max_rank"),
    ],
)  # fmt: skip
def test_numbers_of_methods_are_bounded(own, method, key, line):
    found = ask(own(SHARED), method={"name": method, key: 10**7})
    assert lines(found) == [f"policy.{line}"]


def test_all_reasons_are_given_at_once(own):
    found = ask(
        own(OWN), classes=10**6, method={"name": "split"}, objective={"name": "classification"},
        data={"source": "builtin:labelled"}, adapter={"rank": 10**7}, model={"path": "/etc/passwd"},
    )  # fmt: skip
    expected = ["activations", "max_rank", "max_width", "models", "targets"]
    assert lines(found) == ["data.kind", *(f"policy.{name}" for name in expected)]


def test_what_is_no_experiment_is_refused(own):
    for text in ("x = [", "[nothing]\na = 1", "a = " + "[" * 100_000, "#" * (LONGEST + 1)):
        with pytest.raises(PolicyError) as refused:
            permitted(text, own(SHARED), 0, 0)
        assert text_for_server(refused.value) == "experiment: this client cannot take part in it"


def test_the_machine_is_the_clients(own):
    asked = {"training": {"device": "cuda:7", "threads": 10**6}}
    training = ask(own(SHARED), **asked).experiment.training
    assert training.device == "auto" and training.threads <= 1024
    file = own({**SHARED, "training": {"device": "cpu", "threads": 3}})
    training = ask(file, **asked).experiment.training
    assert (training.device, training.threads) == ("cpu", 3)
    assert ask(own(SHARED), training={"device": "cpu"}).experiment.training.device == "cpu"


# How much


@pytest.mark.parametrize(
    ("training", "method", "steps"),
    [
        ({"local_epochs": 3, "batch_size": 8}, "fedavg", 3 * 13),  # ceil(100 / 8) = 13
        ({"local_steps": 10**9}, "fedavg", 10**9),
        ({"local_steps": 40}, "ditto", 80),
        ({"local_steps": 40}, "pfedme", 200),
        ({"local_examples": 1600, "batch_size": 8}, "fedavg", 100),  # a pair counts as two
        ({"local_tokens": 16 * 512 * 7, "batch_size": 8}, "fedavg", 7),
        # ceil(4 passes of 100 rows in 10 rounds of all clients / 8) = 5
        ({"total_epochs": 4.0, "batch_size": 8}, "fedavg", 5),
    ],
)
def test_batches_are_counted_as_what_will_be_computed(own, training, method, steps):
    asked = Experiment.from_table(
        {"training": training, "method": {"name": method}, "data": {"max_length": 512}}
    )
    assert fewest_steps(asked, 100) == steps
    require_steps(asked, own(SHARED, max_steps=steps), 100)
    if steps > 1:
        with pytest.raises(PolicyError, match=r"policy\.max_steps") as refused:
            require_steps(asked, own(SHARED, max_steps=steps - 1), 100)
        assert text_for_server(refused.value).startswith(
            "policy.max_steps: the experiment asks for more"
        )


@pytest.mark.parametrize(
    ("training", "steps"), [({"local_epochs": 2, "batch_size": 8}, 78), ({"local_steps": 7}, 7)]
)
def test_batches_of_generated_answers_are_counted_as_often_as_they_are_learnt_from(training, steps):
    objective = {**GRPO["objective"], "iterations": 3}  # 3 x 2 epochs of ceil(100 / 8) batches
    asked = Experiment.from_table({**GRPO, "objective": objective, "training": training})
    assert fewest_steps(asked, 100) == steps


def test_a_batch_of_generated_answers_is_bounded_whole(own):
    mine = own({"data": {**SHARED["data"], "source": "builtin:instructions"}}, max_batch=64)
    asked = {**GRPO, "objective": {"name": "grpo", "group": 8}}
    assert lines(ask(mine, **asked, training={"batch_size": 8})) == []
    (refusal,) = ask(mine, **asked, training={"batch_size": 9}).refusals
    assert refusal.line == "policy.max_batch"
    assert refusal.reason == "objective.group x training.batch_size = 72 is above 64"


def arms(seeds):
    """Every experiment in the recipes, those of comparisons too, with so many of their seeds."""
    from fedloom.runs.comparison import read_comparison

    for path in sorted(ROOT.glob("recipes/**/*.toml")):
        if "[compare]" in path.read_text():
            plan = read_comparison(path)
            first = plan.settings.seeds[:seeds]
            for cell in plan.grid_runs:
                if cell.seed in first:
                    yield f"{path.stem} {cell.name}", cell.experiment
        else:
            yield path.stem, Experiment.from_toml(path)


def test_a_run_starts_from_what_is_sent_and_from_no_path(own):
    named = {"data": {"source": "own.jsonl", "kind": "preference"}}
    for start in ("runs/sft", "somebody/adapter", "/etc", "sha256:12", f"sha256:{'0' * 64}/.."):
        asked = Experiment.from_table({**named, "adapter": {"start": start}}).to_toml()
        assert lines(examine(asked, own(named), 0)) == ["experiment"]
    for start in (f"sha256:{'0' * 64}", f"sha256:{'0' * 64}@{'1' * 32}"):
        asked = Experiment.from_table({**named, "adapter": {"start": start}}).to_toml()
        found = examine(asked, own(named), 0)
        assert found.experiment.adapter.start == start


@pytest.mark.parametrize("seeds", tries(1, None))
def test_every_recipe_fits_the_default_bounds(own, seeds):
    count = 0
    for name, asked in arms(seeds):
        file = own(
            {"data": {"source": "own.jsonl", "kind": asked.kind, "choices": asked.data.choices}},
            **OPEN,
        )
        models = [asked.model.path, *(group.model for group in asked.clients.groups.values())]
        models = [path for path in models if path]
        models += [path for path in [getattr(asked.method, "server_model", None)] if path]
        file = replace(file, policy=file.policy.model_copy(update={"models": models}))
        found = examine(asked.to_toml(), file, 0, sent=False)
        wanted = {
            "policy.public_rows",
            "policy.methods",
        }  # a file of the client's; all rows in one place
        assert set(lines(found)) <= wanted, (name, found.refusals)
        rows = 10_000
        assert fewest_steps(asked, rows) <= file.policy.max_steps, name
        count += 1
    assert count > 100


def test_lines_that_refuse_are_lines_of_the_file():
    for line in LINES:
        section, _, key = line.partition(".")
        assert section in ("policy", "data", "experiment")
        key, _, inner = key.partition(".")
        assert not inner or inner in PrivacyPolicySettings.model_fields
        assert (
            not key
            or key in (PolicySettings if section == "policy" else SECTIONS["data"]).model_fields
        )


def test_values_of_a_table_have_whole_names():
    assert dict(leaves({"a": {"b": {"c": 1}, "d": {}}, "e": [2]})) == {
        "a.b.c": 1,
        "a.d": {},
        "e": [2],
    }
    assert isinstance(leaves({}), types.GeneratorType)


def test_every_objective_can_be_trained_by_default(own):
    kinds = {name: kind.accepts[0] for name, (_, kind) in OBJECTIVES.items()}
    for name, kind in kinds.items():
        file = own({"data": {"source": "own.jsonl", "kind": kind}})
        asked = {"objective": {"name": name}, "data": {"source": "x.jsonl", "kind": kind}}
        found = ask(file, **asked)
        assert (
            not found.refusals
            and found.experiment.objective == Experiment.from_table(asked).objective
        )


def test_settings_by_the_names_of_other_tools_are_the_users_alone(own):
    with pytest.raises(PolicyError, match="per_device_train_batch_size: unknown key"):
        examine("[training]\nper_device_train_batch_size = 4096", own(SHARED), 0)


GRPO = {"data": {"source": "builtin:instructions"}, "objective": {"name": "grpo"}}


@pytest.mark.parametrize(
    ("rewards", "allowed", "refused"),
    [
        (["exact_match", "number", "regex:x"], None, 0),
        (["unit_tests", "absent_module:f"], None, 2),
        (["unit_tests", "number"], ["unit_tests", "number"], 0),
        (["exact_match", "regex:x"], ["regex:"], 1),
    ],
)
def test_rewards_that_run_code_are_refused_unless_they_are_named(own, rewards, allowed, refused):
    """Of the experiment and of this client's group; those of another group are not this client's."""
    policy = {} if allowed is None else {"rewards": allowed}
    mine = own({"data": {**SHARED["data"], "source": "builtin:instructions"}}, **policy)
    asked = {**GRPO, "objective": {"name": "grpo", "rewards": rewards}}
    found = ask(mine, **asked)
    assert lines(found) == ["policy.rewards"] * refused
    assert refused or found.experiment.objective.rewards == rewards
    first = (allowed or ["number"])[0]
    if not first.endswith(":"):
        groups = {"clients": {"groups": {"a": {"clients": [1], "rewards": rewards}}}}
        alone = {**GRPO, "objective": {"name": "grpo", "rewards": [first]}, **groups}
        assert lines(ask(mine, **alone)) == []
        assert lines(ask(mine, client=1, **alone)) == ["policy.rewards"] * refused
