"""Who is trained on and who is judged on: every row is accounted for, and no prompt is on both sides."""

import json
import random
import re
from collections import Counter

import pytest
from rich.console import Console

from fedloom.data.examples import Feedback, Instruction, Labelled, Preference
from fedloom.data.loading import LoadedData
from fedloom.data.row_accounting import Account
from fedloom.errors import DataError, SettingsError
from fedloom.experiment.experiment import Experiment
from fedloom.runs.partition_table import show_partition
from fedloom.runs.partitioning import partition_data
from fedloom.runs.run import run_experiment
from observers import Heard
from sampling import drawn

USED = ("public", "trained", "held_out", "judged")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make(data, **sections):
    objective = {"instruction": "sft", "preference": "dpo", "feedback": "kto", "labelled": "classification"}  # fmt: skip
    table = {
        "objective": {"name": objective[data["kind"]]},
        "federation": {"clients": 2},
        **sections,
    }
    return Experiment.from_table({"data": data, **table})


def asks(count, prompts=None, **more):
    return [
        {"prompt": f"p{i % (prompts or count)}", "completion": f"c{i}", **{k: v(i) for k, v in more.items()}}
        for i in range(count)
    ]  # fmt: skip


def sums(record):
    """Both sides of an account, added up here."""
    given = record["rows"] + sum(record["made"].values())
    lost = record["malformed"] + sum(record["dropped"].values())
    return given, lost + sum(record[name] for name in USED)


# --- hand values --------------------------------------------------------------------------------


def test_what_is_over_a_cap_is_trained_on(tmp_path):
    """Found: of 4,000 rows of two clients 480 were neither trained on nor judged."""
    data = {"source": write(tmp_path / "x.jsonl", asks(4000)), "kind": "instruction"}
    found = partition_data(make(data))
    # 800 would be held out for all, 512 are judged: 3,488 are dealt, of 1,744 rows 174 would be held out
    assert len(found.test) == 512
    assert [len(own) for own in found.held_out.values()] == [64, 64]
    assert [len(own) for own in found.train.values()] == [1680, 1680]
    source = found.accounts.source
    assert (source.rows, source.trained, source.held_out, source.judged) == (4000, 3360, 128, 512)
    assert source.dropped == {} and found.accounts.warnings == () and found.accounts.closes


def test_rows_that_nobody_would_judge_are_trained_on(tmp_path):
    data = {"source": write(tmp_path / "x.jsonl", asks(100)), "kind": "instruction"}
    found = partition_data(make(data, evaluation={"per_client": False}))
    assert sum(map(len, found.train.values())) == 80 and not any(found.held_out.values())


def test_only_rows_that_are_judged_take_training_rows_out(tmp_path):
    """Of a test set with more rows than are judged, the others cost nothing."""
    data = {"source": write(tmp_path / "x.jsonl", asks(100)), "kind": "instruction"}
    data["test_source"] = write(tmp_path / "t.jsonl", asks(40))  # p0 to p39
    found = partition_data(make(data, evaluation={"max_examples": 10, "per_client": False}))
    judged = {row.prompt for row in found.test}
    trained = {row.prompt for rows in found.train.values() for row in rows}
    assert len(judged) == 10 and trained == {f"p{i}" for i in range(100)} - judged
    assert found.accounts.source.dropped == {"same prompt as a held-out row": 10}
    assert found.accounts.test.dropped == {"over evaluation.max_examples": 30}
    assert found.accounts.closes


def test_clients_of_a_split_model_hold_nothing_out(tmp_path):
    """No client has the whole model, so nobody would judge what it holds out."""
    data = {"source": write(tmp_path / "x.jsonl", asks(100)), "kind": "instruction"}
    found = partition_data(make(data, method={"name": "split"}))
    assert sum(map(len, found.train.values())) == 80 and not any(found.held_out.values())
    assert found.accounts.source.held_out == 0 and found.accounts.closes


def test_answers_of_five_models_to_ninety_prompts(tmp_path):
    """Found: 90 of 90 held-out rows had their prompt in training, and no word of it."""
    rows = asks(450, 90, model=lambda i: f"m{i // 90}")
    data = {"source": write(tmp_path / "x.jsonl", rows), "kind": "instruction"}
    parties = {"partition": {"kind": "column", "column": "model"}, "federation": {"clients": 5}}
    found = partition_data(make(data, **parties))
    assert (
        len(found.test) == 90
        and Counter(row.prompt for row in found.test).most_common()[-1][1] == 5
    )
    held = [{row.prompt for row in own} for own in found.held_out.values()]
    assert [len(own) for own in held] == [7] * 5 and len(set().union(*held)) == 7
    trained = [row for own in found.train.values() for row in own]
    judged = {row.prompt for row in found.test} | held[0]
    assert len(trained) == 450 - 90 - 35 and not judged & {row.prompt for row in trained}
    assert found.accounts.source.dropped == {} and found.accounts.warnings == ()


def test_a_column_says_who_stays_on_one_side_and_with_one_client(tmp_path):
    rows = asks(200, patient=lambda i: f"x{i // 5}")
    data = {"source": write(tmp_path / "x.jsonl", rows), "kind": "instruction", "group": "patient"}
    for kind in ({"kind": "iid"}, {"kind": "size", "sizes": [1.0, 3.0]}):
        found = partition_data(make(data, partition={**kind, "client_test_fraction": 0.2}))
        sides = [found.test, *found.train.values(), *found.held_out.values()]
        patients = [{row.columns["patient"] for row in side} for side in sides]
        assert sum(map(len, patients)) == 40 and len(set().union(*patients)) == 40
        assert [len(side) for side in sides[1:3]] == ([65, 65] if kind["kind"] == "iid" else [32, 96] and [len(sides[1]), len(sides[2])])  # fmt: skip
        assert found.accounts.closes and not found.accounts.source.dropped


def test_fewer_groups_than_clients_are_refused(tmp_path):
    rows = asks(60, patient=lambda i: f"x{i % 3}")
    data = {"source": write(tmp_path / "x.jsonl", rows), "kind": "instruction", "group": "patient"}
    with pytest.raises(DataError) as caught:
        partition_data(make(data, federation={"clients": 4}))
    assert str(caught.value) == (
        "data.group = 'patient': the 40 training rows are of 2 groups, fewer than federation.clients = 4, "
        "and a group stays with one client; use fewer clients or a finer column"
    )


def test_most_rows_are_counted_before_any_is_held_out(tmp_path):
    """Found: max_rows were training rows, beside whatever was held out."""
    data = {"source": write(tmp_path / "x.jsonl", asks(100)), "kind": "instruction", "max_rows": 50}
    found = partition_data(make(data))
    assert (
        len(found.test) == 10
        and sum(map(len, [*found.train.values(), *found.held_out.values()])) == 40
    )
    assert found.accounts.source.dropped == {"over data.max_rows": 50}


def test_most_rows_are_heeded_of_built_in_ones_too():
    """Found: data.max_rows of a built-in source was passed over."""
    experiment = Experiment.from_table(
        {"data": {"builtin_rows": 80, "max_rows": 30}, "federation": {"clients": 2}}
    )
    source = partition_data(experiment).accounts.source
    assert source.rows == 80 and source.dropped["over data.max_rows"] == 50


def test_none_need_be_held_out_where_there_is_a_test_source(tmp_path):
    """Found: data.test_fraction = 0 was refused in any case."""
    source = write(tmp_path / "x.jsonl", asks(40))
    other = write(tmp_path / "y.jsonl", [{"prompt": f"t{i}", "completion": "c"} for i in range(9)])
    data = {"source": source, "kind": "instruction", "test_fraction": 0}
    found = partition_data(make({**data, "test_source": other}))
    assert len(found.test) == 9 and found.accounts.test == Account(9, judged=9)
    with pytest.raises(SettingsError) as caught:
        make(data)
    assert (
        "data.test_fraction = 0 leaves no global held-out set: name one as data.test_source, or hold rows "
        "out, such as 0.2"
    ) in str(caught.value)


def test_rows_with_a_prompt_of_the_test_source_are_left_out_of_training(tmp_path):
    source = write(tmp_path / "x.jsonl", asks(40))
    other = [{"prompt": " P3 ", "completion": "other"}, {"prompt": "p7", "completion": "c7"}]
    other += [{"prompt": f"t{i}", "completion": "c"} for i in range(6)]
    data = {
        "source": source,
        "kind": "instruction",
        "test_source": write(tmp_path / "y.jsonl", other),
    }
    found = partition_data(make(data, evaluation={"max_examples": 5}))
    assert not {"p3", "p7"} & {row.prompt for own in found.train.values() for row in own}
    accounts = found.accounts
    assert accounts.source.dropped == {"same prompt as a held-out row": 2}
    assert accounts.warnings == (
        "training rows left out: 2 with the same prompt as a held-out row",
    )
    assert accounts.test == Account(8, dropped={"over evaluation.max_examples": 3}, judged=5)
    assert accounts.source.trained + accounts.source.held_out == 38


def test_where_the_test_source_has_all_prompts_only_duplicates_are_left_out_and_it_is_said(
    tmp_path,
):
    source = write(tmp_path / "x.jsonl", asks(40, 4))
    other = [{"prompt": f"p{i % 4}", "completion": f"c{i * 3}"} for i in range(20)]
    data = {
        "source": source,
        "kind": "instruction",
        "test_source": write(tmp_path / "y.jsonl", other),
    }
    found = partition_data(make(data, partition={"client_test_fraction": 0.0}))
    # the completion c(3i) goes with p(3i % 4) in training: the same prompt where i % 4 = 3i % 4, i even
    assert found.accounts.source.dropped == {"same text as a held-out row": 7}
    assert found.accounts.warnings == (
        "training rows left out: 7 with the same text as a held-out row",
        "40 of 40 training rows have the prompt of a row of the test set: only exact duplicates are left "
        "out (7), and 20 of 20 held-out rows have their prompt in training",
    )


def test_a_test_source_that_is_the_source_leaves_nothing_to_train_on(tmp_path):
    source = write(tmp_path / "x.jsonl", asks(40))
    with pytest.raises(DataError) as caught:
        partition_data(make({"source": source, "kind": "instruction", "test_source": source}))
    assert str(caught.value) == (
        "all 40 training rows are left out: same text as a held-out row of data.test_source; give another "
        "data.test_source"
    )


def test_one_prompt_for_all_rows_is_said(tmp_path):
    data = {"source": write(tmp_path / "x.jsonl", asks(40, 1)), "kind": "instruction"}
    found = partition_data(make(data))
    assert found.accounts.warnings == (
        "the 40 rows share 1 prompt(s), of which none can be held out: rows are held out by prompt and "
        "completion, and 8 of 8 held-out rows have their prompt in training",
        "clients 0, 1 have too few prompts to hold one out: rows are held out by prompt and completion, and "
        "4 of 4 held-out rows have their prompt in training",
    )
    assert len(found.test) == 8 and found.accounts.closes


def test_rows_all_alike_are_refused(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"prompt": "p", "completion": "c"}] * 20)
    with pytest.raises(DataError) as caught:
        partition_data(make({"source": path, "kind": "instruction"}))
    assert str(caught.value) == (
        f"the 20 rows of {path} are all alike, none can be held out; name a held-out set as data.test_source"
    )


def test_one_group_alone_is_refused(tmp_path):
    path = write(tmp_path / "x.jsonl", asks(20, ward=lambda i: "w"))
    with pytest.raises(DataError) as caught:
        partition_data(make({"source": path, "kind": "instruction", "group": "ward"}))
    assert str(caught.value) == (
        f"data.group = 'ward': the 20 rows of {path} are of 1 group(s), the smallest of 20 rows, more than "
        "half of all; none can be held out: name a held-out set as data.test_source"
    )


def test_pairs_as_single_answers_are_a_line_of_their_own(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(50)]
    data = {"source": write(tmp_path / "x.jsonl", rows), "kind": "preference"}
    for feedback in ("together", "spread"):
        parts = {"partition": {"feedback": feedback, "kind": "size", "sizes": [1.0, 3.0]}}
        found = partition_data(make(data, objective={"name": "kto"}, **parts))
        assert found.accounts.source.made == {"pairs as two single answers": 36}
        assert found.accounts.source.trained == 72 and found.accounts.closes
        assert [own.trained for own in found.accounts.clients.values()] == [18, 54]


def test_texts_to_pairs_are_a_line_of_their_own(tmp_path):
    rows = [
        {"text": " ".join(f"w{i}x{j}" for j in range(18)), "label": "pn"[i % 2]} for i in range(60)
    ]
    sources = {"continuations": {"chosen": "p", "rejected": "n", "prompt_words": 2, "words": 4, "passages": 3}}  # fmt: skip
    data = {"source": write(tmp_path / "x.jsonl", rows), "kind": "preference", **sources}
    found = partition_data(make(data, objective={"name": "dpo"}))
    source = found.accounts.source
    assert source.rows == 60 and source.made == {"texts to pairs (data.continuations)": 30}
    assert found.accounts.closes and source.trained + source.held_out + source.judged == 90


def test_near_duplicates_are_counted_and_named(tmp_path):
    words = [f"w{i}" for i in range(40)]
    rows = [
        {"prompt": " ".join([*words[:30], f"x{i}"]), "completion": f"c{i} d{i} e{i} f{i}"}
        for i in range(40)
    ]
    far = [
        {"prompt": " ".join(f"y{i}z{j}" for j in range(12)), "completion": "c"} for i in range(40)
    ]
    data = {"source": write(tmp_path / "x.jsonl", rows + far), "kind": "instruction"}
    assert partition_data(make(data)).accounts.warnings == ()
    found = partition_data(make({**data, "near_duplicates": 0.7}))
    # 33 or 28 shared 3-grams of 35: 28 / 38 = 0.74 with every other row of the first forty
    (text,) = found.accounts.warnings
    near = [sum(row.row <= 40 for row in side) for side in (found.test, [r for own in found.held_out.values() for r in own])]  # fmt: skip
    held = sum(map(len, found.held_out.values()))
    assert text.startswith(
        f"near-duplicates (Jaccard 0.7 of word 3-grams): {near[0]} of 16 rows of the global held-out set and "
        f"{near[1]} of {held} that clients hold out have one in training, such as x.jsonl row "
    )
    assert len(re.findall(r"x\.jsonl row \d+ and x\.jsonl row \d+", text)) == 3
    assert partition_data(make({**data, "near_duplicates": 0.8})).accounts.warnings == ()


def test_a_users_own_source_is_accounted_for():
    rows = [Instruction(i, f"p{i % 30}", f"c{i}") for i in range(40)]

    class Own:
        def load(self, rng):
            return LoadedData(rows[:30], rows[30:], "instruction", "own")

    experiment = Experiment.from_table({"objective": {"name": "sft"}, "federation": {"clients": 2}, "data": {"kind": "instruction", "source": "none.jsonl"}})  # fmt: skip
    found = partition_data(experiment, Own())
    assert found.accounts.source.dropped == {"same prompt as a held-out row": 10}
    assert found.accounts.test == Account(10, judged=10) and found.accounts.closes


def test_a_file_for_each_client_keeps_what_machines_could_not_know_and_counts_it(tmp_path):
    files = [
        write(tmp_path / f"{n}.jsonl", [{"prompt": f"p{i}", "completion": f"c{n}-{i}"} for i in range(10 * n, 10 * n + 20)])
        for n in range(3)
    ]  # fmt: skip
    test = write(tmp_path / "t.jsonl", [{"prompt": f"p{i}", "completion": "t"} for i in range(5)])
    data = {"source": files, "kind": "instruction", "test_source": test}
    experiment = make(
        data, partition={"kind": "files", "client_test_fraction": 0.2}, federation={"clients": 3}
    )
    found = partition_data(experiment)
    held = {c: {row.prompt for row in own} for c, own in found.held_out.items()}
    overlap = sum(
        any(row.prompt in own for other, own in held.items() if other != client)
        for client, rows in found.train.items()
        for row in rows
    )
    shared = sum(
        row.prompt in {f"p{i}" for i in range(5)} for own in found.train.values() for row in own
    )
    assert overlap and shared
    assert found.accounts.warnings == (
        f"{overlap} training rows have the prompt of a row that another client holds out, and {shared} that "
        "of a row of the global held-out set; they are trained on, as between machines nobody can know of "
        "them",
    )
    assert [own.rows for own in found.accounts.clients.values()] == [20, 20, 20]
    assert found.accounts.source.rows == 60 and found.accounts.closes


def test_changed_rows_of_a_clients_file_are_noticed(tmp_path):
    """Found: with a file for each client the digest was that of the held-out set alone."""
    digests = []
    for word in ("a", "b"):
        files = [write(tmp_path / f"{n}.jsonl", asks(20 + n)) for n in range(2)]
        write(
            tmp_path / "0.jsonl", [{"prompt": word + str(i), "completion": "c"} for i in range(20)]
        )
        test = write(tmp_path / "t.jsonl", [{"prompt": "t", "completion": "t"}])
        data = {"source": files, "kind": "instruction", "test_source": test}
        digests.append(partition_data(make(data, partition={"kind": "files"})).loaded.digest)
    assert digests[0] != digests[1]


# --- any combination ----------------------------------------------------------------------------


def plain(text):
    """A prompt as it is compared; the rows here are ASCII."""
    return " ".join(text.lower().split())


def line(rng, kind, number, prompts):
    """A row of a file, and what becomes of it: None where it is usable."""
    prompt = rng.choice(["p{}", " P{}", "p{}\n"]).format(rng.randrange(prompts))
    row = {"site": rng.choice("ABC"), "user": f"u{rng.randrange(14)}", "n": number}
    if rng.random() < 0.03:
        return {**row, **bad(kind)}, "malformed"
    if kind == "labelled":
        return {**row, "text": prompt + f" {number % 7}", "label": rng.choice("xy")}, None
    if kind == "instruction":
        return {**row, "prompt": prompt, "completion": f"c{number % 50}"}, None
    if kind == "feedback":
        return {
            **row,
            "prompt": prompt,
            "completion": f"c{number}",
            "label": rng.random() < 0.5,
        }, None
    sides = {"chosen": f"a{number}", "rejected": f"b{number}"}
    if rng.random() < 0.1:
        return {**row, "prompt": prompt, "chosen": "same", "rejected": "same"}, "alike"
    return {**row, "prompt": prompt, **sides}, None


def bad(kind):
    ours = {"labelled": "text", "instruction": "completion", "feedback": "completion", "preference": "chosen"}  # fmt: skip
    row = {
        "prompt": "p",
        "completion": "c",
        "chosen": "a",
        "rejected": "b",
        "label": True,
        "text": "t",
    }
    return {**row, ours[kind]: 3}


def combination(rng, folder):
    """A drawn experiment, with the rows of its files and what becomes of each."""
    kind = rng.choice(["instruction", "preference", "feedback", "labelled"])
    prompts = rng.choice([1, 3, 20, 200, 5000])
    dealt = rng.choice(["iid", "size", "dirichlet", "column", "files"])
    clients = rng.randint(1, 5)
    apart = dealt == "files"
    made = [
        [line(rng, kind, 1000 * n + i, prompts) for i in range(rng.randint(40, 150))]
        for n in range(clients if apart else rng.choice([1, 1, 2]))
    ]
    files = [write(folder / f"{n}.jsonl", [row for row, _ in own]) for n, own in enumerate(made)]
    data = {"source": files, "kind": kind, "max_bad_share": 1.0}
    if apart or rng.random() < 0.3:
        test = [line(rng, kind, 9000 + i, prompts) for i in range(rng.randint(5, 60))]
        data["test_source"] = write(folder / "test.jsonl", [row for row, _ in test])
    else:
        test, data["test_fraction"] = None, rng.choice([0.05, 0.2, 0.5])
    if rng.random() < 0.3:
        data["group"] = "user"
    if rng.random() < 0.3:
        data["only"] = {"site": ["A", "B"]}
    if rng.random() < 0.2:
        data["max_rows"] = rng.randint(20, 80)
    parts = {"kind": dealt, "client_test_fraction": rng.choice([0.0, 0.1, 0.3])}
    parts |= {"sizes": [float(n + 1) for n in range(clients)]} if dealt == "size" else {}
    parts |= {"column": "site"} if dealt in ("dirichlet", "column") else {}
    parts["minimum"] = 1
    objective = {"instruction": "sft", "labelled": "classification", "feedback": "kto"}.get(kind)
    objective = objective or rng.choice(["dpo", "kto"])
    if kind == "preference" and objective == "kto":
        if rng.random() < 0.5:
            data["incomplete_pairs"] = "feedback"
        if clients > 1 and not apart and rng.random() < 0.5:
            parts["feedback"] = "spread"
    evaluation = {
        "max_examples": rng.choice([4, 30, 512]), "client_max_examples": rng.choice([2, 8, 64]),
        "per_client": rng.random() < 0.9,
    }  # fmt: skip
    table = {
        "data": data, "partition": parts, "evaluation": evaluation,
        "objective": {"name": objective}, "federation": {"clients": clients, "seed": rng.randrange(99)},
    }  # fmt: skip
    return table, made, test


def text_of(row):
    match row:
        case Labelled(text=text):
            return (text,)
        case Preference(prompt=prompt, chosen=chosen, rejected=rejected):
            return (prompt, chosen, rejected)
    return (row.prompt, row.completion)


def prompt(row):
    return plain(row.text if isinstance(row, Labelled) else row.prompt)


def whole(row):
    return tuple(map(plain, text_of(row)))


def refused(message):
    """Whether what was drawn cannot be divided by anybody: few rows, few groups, all alike."""
    words = (
        "fewer than federation.clients", "none can be held out", "partition.minimum", "too few to hold out",
        "training rows there are", "holds no usable row", "training rows are left out",
        "coordinator's held-out set does not have", "would have no row to train on", "more than the",
    )  # fmt: skip
    return any(word in message for word in words)


def check(table, made, test):
    """Count again from the files; return which ways were taken."""
    data, apart = table["data"], table["partition"]["kind"] == "files"
    found = partition_data(Experiment.from_table(table))
    accounts = found.accounts.to_record()
    kept = {"A", "B"} if "only" in data else {"A", "B", "C"}
    singles = data.get("incomplete_pairs") == "feedback"

    def fates(rows):
        lost = Counter()
        for row, fate in rows:
            lost["filtered"] += row["site"] not in kept
            if row["site"] in kept:
                lost["malformed"] += fate == "malformed"
                lost["alike"] += fate == "alike"
        return lost

    lines, lost = [row for own in made for row in own], Counter()
    for own in made:
        lost += fates(own)
    source = accounts["source"]
    assert source["rows"] == len(lines) and source["malformed"] == lost["malformed"]
    assert source["dropped"].get("not among data.only", 0) == lost["filtered"]
    assert source["dropped"].get("chosen equals rejected", 0) == (0 if singles else lost["alike"])
    for account in (source, *accounts["clients"], *filter(None, [accounts["test_source"]])):
        given, used = sums(account)
        assert given == used and account["unaccounted"] == 0
        assert min([0, *account["dropped"].values()]) == 0
    trained = {client: list(rows) for client, rows in found.train.items()}
    sizes = [
        (own["client"], own["trained"], own["held_out"], own["rows"]) for own in accounts["clients"]
    ]
    assert [(c, t, h) for c, t, h, _ in sizes] == [
        (c, len(rows), len(found.held_out[c])) for c, rows in trained.items()
    ]
    assert source["trained"] == sum(map(len, trained.values()))
    assert source["held_out"] == sum(map(len, found.held_out.values()))
    if test is None:
        assert source["judged"] == len(found.test) and accounts["test_source"] is None
    else:
        assert source["judged"] == 0 and accounts["test_source"]["judged"] == len(found.test)
        assert accounts["test_source"]["rows"] == len(test)
    assert len(found.test) <= table["evaluation"]["max_examples"]
    most = table["evaluation"]["client_max_examples"] * table["evaluation"]["per_client"]
    assert all(len(own) <= most for own in found.held_out.values())
    # rows, by what they are called in their file: each is in one place at most
    there = Counter()
    for client, rows in trained.items():
        there += Counter({(client if apart else 0, row.row) for row in rows} if table["objective"]["name"] != "kto" else [])  # fmt: skip
        there += Counter((client if apart else 0, row.row) for row in found.held_out[client])
    if table["objective"]["name"] == "dpo" and not singles:
        there += Counter((0, row.row) for row in found.test if test is None)
        assert max(there.values(), default=1) == 1
        lost_later = sum(source["dropped"].values()) - lost["filtered"] - lost["alike"]
        usable = len(lines) - lost["filtered"] - lost["alike"] - lost["malformed"]
        assert sum(there.values()) == usable - lost_later
    judged_all = found.test
    ways = set()
    told = " ".join(accounts["warnings"])
    ways |= {word for word in ("prompt and completion", "only exact duplicates") if word in told}
    if "group" in data:
        if not apart and test is None:
            sides = [[r for rows in trained.values() for r in rows], [*judged_all, *(r for own in found.held_out.values() for r in own)]]  # fmt: skip
            users = [{row.columns["user"] for row in side} for side in sides]
            assert not users[0] & users[1]
            if table["objective"]["name"] != "kto":
                assert not {whole(row) for row in sides[0]} & {whole(row) for row in sides[1]}
            ways.add("group")
        return ways
    own_prompts = {c: {prompt(row) for row in rows} for c, rows in trained.items()}
    held = {c: {prompt(row) for row in rows} for c, rows in found.held_out.items()}
    if apart:
        named = re.search(r"clients? ([\d, ]+) ha[sv]e? too few prompts", told)
        by_row = {int(c) for c in named[1].split(",")} if named else set()
        assert {c for c in held if held[c] & own_prompts[c]} <= by_row
        for c in (
            by_row if table["objective"]["name"] != "kto" else ()
        ):  # no prompt could be held out
            sizes = Counter(prompt(row) for row in (*trained[c], *found.held_out[c]))
            assert not any(2 * n <= len(found.files[c].train) and n <= most for n in sizes.values())
        claims = {c: {whole(row) for row in rows} if c in by_row else held[c] for c, rows in found.held_out.items()}  # fmt: skip
        others = {c: set().union(*(own for o, own in claims.items() if o != c)) for c in claims}
        in_test = {prompt(row) for row in judged_all}
        rows = [(c, row) for c, own in trained.items() for row in own]
        if table["objective"]["name"] == "kto":  # single answers: count the rows that they are of
            return ways
        overlap = sum(prompt(row) in others[c] or whole(row) in others[c] for c, row in rows)
        shared = sum(prompt(row) in in_test for _, row in rows)
        numbers = re.search(r"([\d,]+) training rows have the prompt .* and ([\d,]+) that of", told)
        assert ([int(n.replace(",", "")) for n in numbers.groups()] if numbers else [0, 0]) == [overlap, shared]  # fmt: skip
        ways.add("files" if overlap else "files apart")
        return ways
    everywhere = set().union(*own_prompts.values())
    both = [r for r in (*judged_all, *(r for own in found.held_out.values() for r in own)) if prompt(r) in everywhere]  # fmt: skip
    if both:
        assert "have their prompt in training" in told  # few prompts: said, and with how many
    else:
        ways.add("apart")
    return ways


@pytest.mark.parametrize("batch", range(4))
def test_the_account_closes_and_no_prompt_is_on_both_sides_in_any_combination(tmp_path, batch):
    """200 in all, or as many more as it takes to see each way; what is said of few prompts, and of files, is
    counted again here."""
    ways, done, tries = Counter(), 0, 0
    least = Counter({"apart": 10, "prompt and completion": 2, "group": 1})
    while tries < 120 and (
        done < 50 or not ways >= least or not ways["files"] + ways["files apart"]
    ):
        rng = random.Random(f"{batch} {tries} {drawn('divisions').random()}")
        folder = tmp_path / f"{tries}"
        folder.mkdir()
        tries += 1
        table, made, test = combination(rng, folder)
        try:
            ways.update(check(table, made, test))
            done += 1
        except (DataError, SettingsError) as error:
            if not refused(str(error)):
                raise
    assert tries < 120 and ways["apart"] >= 10 and ways["prompt and completion"] >= 2
    assert ways["group"] and ways["files"] + ways["files apart"]


def test_single_answers_beside_pairs_are_no_rows_to_judge(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": f"a{i}", "rejected": f"b{i}"} for i in range(50)]
    rows += [{"prompt": f"p{i}", "chosen": f"x{i}", "rejected": ""} for i in range(50)]
    data = {
        "source": write(tmp_path / "x.jsonl", rows),
        "kind": "preference",
        "incomplete_pairs": "feedback",
    }
    found = partition_data(make(data, objective={"name": "kto"}))
    assert all(isinstance(row, Preference) for row in found.test) and len(found.test) == 10
    assert all(isinstance(row, Feedback) for own in found.train.values() for row in own)
    assert found.accounts.closes
    held = {prompt(r) for r in (*found.test, *(r for own in found.held_out.values() for r in own))}
    assert found.accounts.source.dropped == {"single answer beside held-out pairs": len(held)}
    assert not held & {prompt(row) for own in found.train.values() for row in own}


def test_a_partition_is_readable_at_80_columns_with_few_clients_and_with_many(tmp_path):
    rows = asks(400, 70, site=lambda i: f"s{i % 7}")
    data = {"source": write(tmp_path / "x.jsonl", rows), "kind": "instruction", "only": {"site": ["s1", "s2", "s3"]}}  # fmt: skip
    for clients in (3, 20):
        shown = show_partition(
            make(data, federation={"clients": clients}), tmp_path / "picture.svg"
        )
        console = Console(width=80, color_system=None, force_terminal=False)
        with console.capture() as captured:
            console.print(shown.tables)
        lines = [line.strip() for line in captured.get().splitlines()]
        assert max(map(len, lines)) <= 80
        assert "dropped: not among data.only  229" in [
            re.sub(r" {3,}", "  ", line) for line in lines
        ]
        assert ["client", "rows", "left out", "trained on", "held out"] in [re.split(r" {2,}", line) for line in lines]  # fmt: skip
        whole = [
            list(map(int, line.split())) for line in lines if re.fullmatch(r"\d+( +\d+){4}", line)
        ]
        assert len(whole) == clients
        assert all(rows == lost + trained + held for _, rows, lost, trained, held in whole)


def test_a_run_says_what_became_of_its_rows(experiment, rows_file, tmp_path):
    rows = [{"prompt": f"where is {i}?", "completion": f" at {i}"} for i in range(60)]
    rows.append({"prompt": "p", "completion": 3})
    test = [*rows[:4], *({"prompt": f"who is {i}?", "completion": " me"} for i in range(9))]
    data = {
        "source": rows_file(rows),
        "test_source": rows_file(test, "t.jsonl"),
        "kind": "instruction",
    }
    own = experiment(data=data, objective={"name": "sft"}, federation={"clients": 2, "rounds": 1}, evaluation={"samples": 0, "max_examples": 10})  # fmt: skip
    watcher = Heard()
    result = run_experiment(own, observer=watcher)
    assert (
        "rows: 61 read = 1 malformed + 4 dropped + 50 trained on + 6 held out by clients"
        in watcher.stages
    )
    assert "rows of the test set: 13 read = 3 dropped + 10 held out for all" in watcher.stages
    assert "training rows left out: 4 with the same prompt as a held-out row" in watcher.warnings
    record = json.loads((result.folder / "run.json").read_text())["data"]
    assert record["account"]["source"]["dropped"] == {"same prompt as a held-out row": 4}
    warned = [text for text in watcher.warnings if "does nothing" not in text]
    assert record["account"]["warnings"] == warned and record["malformed"] == 1
    assert record["train"] == record["account"]["source"]["trained"] == 50
    for account in (record["account"]["source"], *record["account"]["clients"]):
        assert sums(account)[0] == sums(account)[1]
