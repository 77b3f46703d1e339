"""FedGRPO by hand: grades (1, 0, 1, 1) of four answers are standardised to 0.577 and -1.732."""

import json
import re

import numpy as np
import pytest
import torch

import fedloom
from absent import Schedule, played
from fedloom.aggregation.expert_grades import (
    assigned,
    expert_rewards,
    experts_of,
    nearest,
    standardised,
)
from fedloom.errors import MessageError, SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.methods.bases.answer_grades import (
    GRADES,
    LENGTHS,
    QUESTIONS,
    TOKENS,
    GradeWire,
    grades_of,
    prepare_expert,
    references_of,
)
from fedloom.objectives.grpo import group_advantages
from fedloom.rewards.functions import exact_match
from fedloom.runs.assembly import assemble
from fedloom.runs.observers import Silent
from fedloom.runs.partitioning import partition_data
from fedloom.runs.run import resume_run, run_experiment
from fedloom.tensors import by_client
from fedloom.wire.messages import Payload

HAND = torch.tensor([[1.0, 0.0, 1.0, 1.0]])


def test_hand_numbers():
    # mean 3/4, population std sqrt(3)/4 = 0.4330127: 0.25 / 0.4330127 and -0.75 / 0.4330127
    assert HAND.double().std(1, correction=0).item() == pytest.approx(0.4330127, abs=1e-7)
    expected = [0.57735027, -1.73205081, 0.57735027, 0.57735027]
    assert standardised(HAND)[0].tolist() == pytest.approx(expected, abs=1e-8)
    # over the experts, as it is printed, they add up to 0, and nothing would be learnt
    assert standardised(HAND).sum().item() == pytest.approx(0, abs=1e-12)
    # GRPO's advantages of the same answers: the sample's std is 1/2, with 1e-4 added to it
    alone = group_advantages(HAND)[0][0].tolist()
    assert alone == pytest.approx([0.5, -1.5, 0.5, 0.5], abs=4e-4)
    one = expert_rewards({7: HAND}, {7: [0]}, [{7: 1.0}]).float()
    assert group_advantages(one)[0][0].tolist() == pytest.approx(alone, abs=2e-4)


def test_unit_and_zero_of_an_expert_have_no_say():
    asked = {0: [0, 1], 1: [0, 1]}
    grades = torch.tensor([[1.0, 0.0, 3.0], [2.0, 2.0, 5.0]])
    other = torch.tensor([[0.0, 1.0, 0.0], [4.0, 4.0, 4.0]])
    alike = [{0: 1.0, 1: 1.0}] * 2
    found = expert_rewards({0: grades, 1: other}, asked, alike)
    scaled = expert_rewards({0: 1e4 * grades - 7e3, 1: other}, asked, alike)
    assert torch.allclose(found, scaled, atol=1e-6)
    liar = expert_rewards({0: torch.tensor([[0.0, 0.0, 1e6]] * 2)}, asked, alike)
    assert liar.abs().max().item() == pytest.approx(2**0.5)  # sqrt(G - 1)
    assert standardised(torch.full((1, 3), 0.1)).tolist() == [[0, 0, 0]]


def test_the_mean_is_over_those_that_graded_and_by_their_weights():
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    # z of (1, 0) is (1, -1): question 0 by client 0 alone, 1 by both at 3 to 1, 2 by nobody
    graded, asked = {0: torch.cat([a, a]), 1: b}, {0: [0, 1], 1: [1]}
    found = expert_rewards(graded, asked, [{0: 0.2}, {0: 0.75, 1: 0.25}, {0: 1.0}])
    assert found.tolist() == [[1, -1], [0.5, -0.5], [0, 0]]
    alike = [{0: 1.0, 1: 1.0}] * 3
    assert expert_rewards(graded, asked, alike).tolist() == [[1, -1], [0, 0], [0, 0]]
    # an expert without any competence counts nothing
    assert expert_rewards({0: a}, {0: [0]}, [{0: 0.0}]).tolist() == [[0, 0]]


def test_experts_know_most_about_the_nearest_questions():
    # cosines with (1, 1, 2): 3 / sqrt(2) / norm, of (1): 2 / sqrt 6, of (2): 1 / sqrt 6, of (1, 2): 3 / sqrt 12
    assert nearest([1, 1, 2], [[2], [1], [3], [1, 2]], 3) == [3, 1, 0]
    assert nearest([1], [[1], [1], []], 2) == [0, 1]
    draws = {0: 0.9, 1: 0.1, 2: 0.5}
    assert experts_of({0: 0.5, 1: 0.2, 2: 0.2}, draws, 2) == [0, 1]
    assert experts_of({0: 0.1, 2: 0.9}, draws, 5) == [0, 2]
    every = {client: [own, 1 - own] for client, own in draws.items()}
    # question 0: client 0, then 1 by its draw of 0.1; question 1: all alike, draws 0.1, 0.9 and 0.5
    alike = [{0: 0.5, 1: 0.2, 2: 0.2}, dict.fromkeys(draws, 1.0)]
    assert assigned(alike, every, 2) == {0: [0, 1], 1: [0], 2: [1]}


WIRE = GradeWire(questions=3, group=2, longest=4, width=50)


def sent(questions=(0, 2), lengths=((1, 2), (1, 1)), tokens=(5, 6, 7, 8, 9)):
    return {
        QUESTIONS: torch.tensor(questions, dtype=torch.int32),
        LENGTHS: torch.tensor(lengths, dtype=torch.int32),
        TOKENS: torch.tensor(tokens, dtype=torch.int32),
    }


def test_answers_are_read_as_they_were_packed():
    assert WIRE.unpack(sent()) == ([0, 2], [[5], [6, 7], [8], [9]])


@pytest.mark.parametrize(
    ("own", "told"),
    [
        ({"questions": (2, 0)}, "not those to some"),
        ({"questions": (0, 3)}, "not those to some"),
        ({"questions": (-1, 2)}, "not those to some"),
        ({"questions": (0,)}, "not those to some"),
        ({"questions": (), "lengths": np.zeros((0, 2)), "tokens": ()}, "not those to some"),
        ({"lengths": ((1, 2), (1, 2))}, "not those to some"),
        ({"lengths": ((0, 3), (1, 1))}, "1 to 4 tokens"),
        ({"lengths": ((5, -2), (1, 1))}, "1 to 4 tokens"),
        ({"tokens": (5, 6, 7, 8, 50)}, "none of the 50"),
        ({"tokens": (5, 6, 7, 8, -1)}, "none of the 50"),
    ],
)
def test_a_client_grades_nothing_that_is_no_answer(own, told):
    with pytest.raises(MessageError, match=told):
        WIRE.unpack(sent(**own))


@pytest.mark.parametrize(
    ("grades", "told"),
    [(torch.zeros(1, 2), "1 questions, 2"), (torch.full((2, 2), torch.inf), "finite")],
)
def test_grades_are_one_for_each_answer_and_finite(grades, told):
    WIRE.check(2, {GRADES: torch.zeros(2, 2)})
    with pytest.raises(MessageError, match=told):
        WIRE.check(2, {GRADES: grades})


# In runs


@pytest.fixture
def grpo(table, tmp_path):
    """Make a small experiment; sections are changed."""

    def make(folder="run", **sections):
        own = {
            **table,
            "data": {"source": "builtin:sums", "builtin_rows": 60},
            "public": {"rows": 16, "labelled": True},
            "objective": {
                "name": "grpo",
                "group": 3,
                "max_new_tokens": 3,
                "rewards": ["regex:[a-m]"],
            },
            "clients": {"groups": {"own": {"clients": [1], "rewards": ["regex:[n-z]", "number"]}}},
            "method": {"name": "fedgrpo", "questions": 6},
            "federation": {"clients": 3, "rounds": 3},
            "training": {"learning_rate": 1e-2, "batch_size": 4},
            "evaluation": {"samples": 0, "per_client": False},
            "output": {"folder": str(tmp_path / folder), "verify": False},
        }
        changed = {name: {**own.get(name, {}), **section} for name, section in sections.items()}
        return Experiment.from_table({**own, **changed})

    return make


CHOSEN = {"choose": "competence", "auxiliary": 8, "nearest": 3}


def rounds(result):
    return [json.loads(line) for line in (result.folder / "rounds.jsonl").read_text().splitlines()]


def test_the_policy_learns_from_grades_alone_and_clients_train_but_once(grpo):
    result = fedloom.run(grpo(method=CHOSEN))
    assert result.metrics["loss"] != result.metrics_before["loss"]
    for record in rounds(result)[1:]:
        details = record["details"]
        assert sum(details["graded"].values()) == 12  # 6 questions, 2 experts each
        assert set(details["competence"]) == {"0", "1", "2"}
        assert {*details["mean_grade"]} == {*details["graded"]}
        reported = {own: facts["reward"] for own, facts in record["client_train"].items()}
        assert reported == pytest.approx(details["mean_grade"])
    costs = [json.loads(own) for own in (result.folder / "costs.jsonl").read_text().splitlines()]
    trained = [(c["round"], c["client"]) for c in costs if c["client"] >= 0 and c["steps"]]
    assert sorted(trained) == [(1, 0), (1, 1), (1, 2)]
    assert {c["round"] for c in costs if c["client"] == -1 and c["steps"]} == {1, 2, 3}


@pytest.mark.slow
def test_fedgrpo_resumed_ends_with_the_same_bits(grpo, tmp_path):
    fedloom.run(grpo("one", method=CHOSEN))
    fedloom.run(grpo("again", method=CHOSEN))
    resume_run(tmp_path / "again", from_round=2)
    files = [tmp_path / own / "adapter" / "adapter_model.safetensors" for own in ("one", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_fedgrpo_workers_give_the_bits_of_one_process(grpo, tmp_path):
    fedloom.run(grpo("one", method=CHOSEN))
    run_experiment(grpo("two", method=CHOSEN), observer=Silent(), workers=2)
    files = [tmp_path / own / "adapter" / "adapter_model.safetensors" for own in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("method", [{}, CHOSEN])
def test_fedgrpo_between_machines_has_the_bits_of_a_simulation(grpo, loopback, tmp_path, method):
    fedloom.run(grpo("here", method=method))
    there, federation = grpo("there", method=method), loopback(3)
    mail = federation.mail(source="builtin:sums")
    run_experiment(there, observer=Silent(), remote=federation.engine(there, mail))
    states = [
        [
            json.loads(line).get("state")
            for line in (tmp_path / own / "audit.jsonl").read_text().splitlines()
        ]
        for own in ("here", "there")
    ]
    found = [[state for state in own if state] for own in states]
    assert found[0] == found[1] and len(found[0]) == 4


def test_questions_are_graded_by_those_that_answer(grpo):
    """Client 2 is late in round 1, comes back in 2; 1 is away in 2; client 0 leaves before round 3."""
    federation = {"clients": 3, "rounds": 3, "quorum": 0.2}
    settings = grpo(method={**CHOSEN, "experts": 3}, federation=federation)
    schedule = Schedule(away={2: {1}}, late={1: {2}}, left={0: 3})
    own = played(settings, schedule)
    graded = [record.details["graded"] for record in own.records]
    assert graded == [{"0": 6, "1": 6}, {"0": 6, "2": 6}, {"1": 6, "2": 6}]
    known = [sorted(by_client(state.tensors, "right")) for state in own.states]
    assert known[1:] == [[0, 1, 2]] * 2  # of who is away or left as well, by its id
    with_all = played(settings, Schedule())
    assert own.states[0].digest() != with_all.states[0].digest()


def test_without_a_grade_that_tells_answers_apart_the_policy_stays(grpo):
    clients = {"groups": {"own": {"clients": [1], "rewards": ["regex:(?s).*"]}}}
    alike = grpo(objective={"rewards": ["regex:(?s).*"]}, clients=clients)
    found = played(alike, Schedule())
    assert found.states[0].digest() == found.states[2].digest()


def test_a_client_grades_by_its_own_row_where_it_has_the_question(grpo, rows_file):
    """Else by what its own model answers."""
    rows = [{"prompt": f"{n}+{n}=", "completion": f"{2 * n}"} for n in range(1, 25)]
    asked = [{"prompt": row["prompt"], "completion": "?"} for row in rows[:8]]
    asked += [{"prompt": f"{n}+1=", "completion": "?"} for n in range(30, 38)]
    held = [{"prompt": f"{n}+0=", "completion": f"{n}"} for n in range(50, 60)]
    settings = grpo(
        data={"source": rows_file(rows), "kind": "instruction", "test_source": rows_file(held, "held.jsonl")},
        public={"source": rows_file(asked, "asked.jsonl"), "rows": 16, "labelled": False},
        federation={"clients": 1}, clients={"groups": {}},
        objective={"rewards": ["exact_match"]},
        partition={"client_test_fraction": 0.0},
    )  # fmt: skip
    parts = assemble(settings, partition_data(settings))
    client = parts.local.client(0, 1)
    prepare_expert(client, 1e-2, 0)
    public, maker = client.public.share, client.maker
    every = np.arange(16)
    references = maker.texts(references_of(client, public, every))
    guessed = maker.texts(maker.greedy(client.model, public, every))
    prompts = maker.encoder.tokenizer.batch_decode(maker.read(client.model, public, every)[0])
    truth = {row["prompt"]: row["completion"] for row in rows}
    own = [truth.get(re.search(r"\d+\+\d+=", prompt)[0]) for prompt in prompts]
    assert sum(t is not None for t in own) == 8
    assert references == [guess if t is None else t for t, guess in zip(own, guessed, strict=True)]
    tokens = maker.encoder.tokenizer
    answers = [tokens(text, add_special_tokens=False)["input_ids"] for text in ("2", "4", "6")] * 16
    grades = grades_of(client, public, range(16), answers)
    assert grades.tolist() == [
        [exact_match("", answer, reference) for answer in ("2", "4", "6")]
        for reference in references
    ]
    assert grades.sum().item() >= 3  # of 1+1, 2+2 and 3+3, where they are among the eight


def test_a_handler_refuses_answers_that_are_none(grpo):
    settings = grpo()
    parts = assemble(settings, partition_data(settings))
    client = parts.local.client(0, 1)
    bad = sent(lengths=((1, 2, 1), (1, 1, 1)), tokens=(5, 6, 7, 8, 9, 10**6, 4))
    with pytest.raises(MessageError, match="none of the"):
        parts.local.handlers["grade"](client, Payload(bad, {"learning_rate": 0.1}))


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"objective": {"name": "sft"}}, 'has answers graded, not objective.name = \'sft\': use objective.name = "grpo"'),
        ({"public": {"labelled": False}, "method": CHOSEN}, "set public.labelled = true"),
        ({"method": {**CHOSEN, "auxiliary": 16}}, "method.auxiliary = 16 leaves no question of public.rows = 16"),
        ({"method": {"questions": 0}}, "method.questions"),
        ({"training": {"keep_optimizer_state": True}}, "makes the server's optimizer anew"),
        ({"privacy": {"unit": "row", "target_epsilon": 5.0}}, "grades follow from the answers of rows"),
        ({"admission": {"max_change": 1.0}}, "admission.max_change bounds changes of parameters"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_it(grpo, sections, told):
    table = {
        **grpo().to_table(),
        **{n: {**grpo().to_table().get(n, {}), **s} for n, s in sections.items()},
    }
    if "objective" in sections:
        table |= {"objective": sections["objective"], "clients": {}}
    with pytest.raises(SettingsError) as caught:
        Experiment.from_table(table)
    assert any(told in problem for problem in caught.value.problems), caught.value.problems
