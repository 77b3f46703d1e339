"""Who holds which experts, on the page: by hand from records, and as a page in a run's own words."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest

from fedloom.reports.sections.by_method import drawn
from fedloom.reports.sections.expert_assignment import history
from fedloom.statistics.difference_tests import group_test

PARTITION = {
    "column": "ward",
    "clients": [
        {"client": c, "counts": {"x<b>est</b>": 9 * (c % 2), "west": 9 * (1 - c % 2)}}
        for c in range(4)
    ],
}

DETAILS = {
    "layers": ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"],
    "experts": 3,
    "held": {
        "0": [[0, 1], [0]],
        "1": [[1, 2], [2]],
        "2": [[0, 1], [0, 1]],
        "3": [[2], [2]],
    },
    "shares": {
        "0": [[0.25, 0.75], [1.0]],
        "1": [[0.5, 0.5], [1.0]],
        "2": [[1.0, 0.0], [0.5, 0.5]],
        "3": [[1.0], [1.0]],
    },
    "clients": [0, 1, 2, 3],
    "similarity": [[1.0 if a == b else (a - b) / 10 for b in range(4)] for a in range(4)],
}


def record(round, **changes):
    return {"round": round, "details": {"experts": {**DETAILS, **changes}}}


def run(*rounds, partition=PARTITION, **own):
    return SimpleNamespace(run={"seed": 0, **own}, partition=partition, rounds=list(rounds))


def section_of(*rounds, partition=PARTITION):
    (own,) = drawn([run(*rounds, partition=partition)])
    return own.content


def test_clients_stand_by_group_and_share_what_both_hold():
    own = history([{"round": 0}, record(1)], PARTITION)
    assert own.clients == (0, 2, 1, 3)
    assert own.groups == ("west", "west", "x<b>est</b>", "x<b>est</b>")
    assert own.shared(1) == [[1.5, 1.5, 0.5, 0], [1.5, 2, 0.5, 0], [0.5, 0.5, 1.5, 1], [0, 0, 1, 1]]
    assert own.similarity(1)[0] == [1.0, -0.2, -0.1, -0.3]


def test_load_is_the_share_of_all_tokens():
    load = history([record(1)], PARTITION).load(1)
    # layer 0: 0.25 + 1, 0.75 + 0.5 + 0, 0.5 + 1 of 4; layer 1: 1 + 0.5, 0.5, 1 + 1 of 4
    assert load["0"] == pytest.approx(((1.25 + 1.5) / 8, 1.25 / 4, 1.5 / 4))
    assert load["2"] == pytest.approx(((1.5 + 2) / 8, 1.5 / 4, 2 / 4))


def test_a_cell_is_blank_where_an_expert_is_not_held():
    cells = history([record(1)], PARTITION).cells(1)
    # columns are clients 0, 2, 1, 3; rows experts 0, 1, 2; first layer 0
    assert [cells[i : i + 4] for i in range(0, 24, 4)] == [
        "29  ",
        "705 ",
        "  59",
        "95  ",
        " 5  ",
        "  99",
    ]


def test_absent_clients_hold_nothing_in_that_round():
    held = {c: own for c, own in DETAILS["held"].items() if c != "3"}
    own = history([record(1), record(2, held=held, shares={})], PARTITION)
    assert own.clients == (0, 2, 1, 3)
    assert own.shared(2)[3] == [0, 0, 0, 0]
    assert "9" not in own.cells(2)


def test_clients_may_have_any_ids():
    ids = {"0": "7", "1": "3", "2": "9", "3": "5"}
    changed = {key: {ids[c]: own for c, own in DETAILS[key].items()} for key in ("held", "shares")}
    own = history([record(1, clients=[7, 3, 9, 5], **changed)], {**PARTITION, "column": None})
    assert own.clients == (3, 5, 7, 9)
    assert own.similarity(1)[0] == [1.0, -0.2, 0.1, -0.1]


def test_the_test_by_hand():
    own = history([record(1)], PARTITION)
    found = own.test(1)
    # pairs within the groups: (0, 2) 1.5 and (1, 3) 1; across: 0.5, 0, 0.5, 0
    assert (found.same, found.other) == (1.25, 0.25)
    # the three ways to halve four clients give 1.25, 0.25 and 0.25, each by two labellings
    assert found.ways == 6 and found.p == pytest.approx(1 / 3)
    assert found.expected == pytest.approx(1.75 / 3)


def test_groups_at_random_have_any_p():
    values = np.random.default_rng(1).random((12, 12))
    values = values + values.T
    found = group_test(values, list("abc" * 4))
    assert found.ways == 5000 and 0.02 < found.p < 0.98
    with pytest.raises(ValueError, match="pairs within them and pairs across"):
        group_test(values[:3, :3], list("abc"))


def test_clients_that_were_divided_by_rows_or_have_a_value_each_have_no_groups():
    alone = {
        "column": "ward",
        "clients": [{"client": c, "counts": {str(c): 3}} for c in range(4)],
    }
    for partition in ({**PARTITION, "column": None}, alone):
        section = section_of(record(1), partition=partition)
        assert section["test"] is None and section["groups"] == []
        assert section["history"].clients == (0, 1, 2, 3)


def test_runs_of_earlier_releases_declare_nothing_and_have_the_section_where_there_is_one():
    assert drawn([run({"round": 0}, {"round": 1, "details": {}})]) == []
    declared = [{"kind": "expert_assignment", "title": "Who", "text": "", "key": "held"}]
    assert [own.spec.title for own in drawn([run(record(1))])] == ["Who holds which experts"]
    (own,) = drawn([run(record(1), sections=declared)])
    assert own.note == "no round has anything under details['held']"


def test_details_of_another_form_are_said_to_be_so():
    (own,) = drawn([run(record(1), record(2, held={"0": 3}))])
    assert own.content == {} and own.note == (
        "kind 'expert_assignment' cannot draw details['experts']: it lacks what this kind draws"
    )


def test_many_rounds_are_thinned_to_the_first_the_last_and_some_between():
    section = section_of(*(record(i) for i in range(1, 201)))
    assert len(section["rounds"]) == len(section["cells"]) == 60
    assert section["rounds"][0] == 1 and section["rounds"][-1] == 200


@pytest.mark.slow
def test_the_page_of_a_run(tmp_path, experiment):
    import fedloom
    from fedloom.reports.run_page import write_report

    own = experiment(
        method={"name": "fedamole", "max_experts_per_client": 4},
        adapter={"kind": "experts", "rank": 2, "experts": 6},
        federation={"clients": 4, "rounds": 2},
        output={"folder": str(tmp_path / "run")},
    )
    result = fedloom.run(own)
    page = write_report([result.folder]).read_text()
    assert "Who holds which experts" in page
    cells = json.loads(re.search(r'<script type="application/json">(.*?)</script>', page)[1])
    layers = page.count('class="cells"')
    assert [len(one) for one in cells] == [layers * 6 * 4] * 2
    assert page.count("fill-opacity") >= layers * 6 * 4
    assert "x<b>est</b>" not in page


def test_values_are_escaped(tmp_path):
    from fedloom.reports.html import fill

    page = fill("sections/expert_assignment.html.j2", own=section_of(record(1)))
    assert "x<b>est</b>" not in page and "x&lt;b&gt;est" in page
