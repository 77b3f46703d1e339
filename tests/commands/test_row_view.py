"""What ``fedloom data show`` prints: tokens with their borders, before and after truncation."""

import re

import pytest
from rich.console import Console

from fedloom.commands.row_view import PROMPT, SPECIAL, TRAINED, show_row
from fedloom.errors import DataError
from fedloom.experiment.experiment import Experiment


@pytest.fixture
def shown(model_folder, rows_file):
    """Print a row of an experiment on these rows, with its colours if asked."""

    def show(rows, number=0, *, colours=False, objective="sft", **data):
        experiment = Experiment.from_table(
            {
                "data": {"source": str(rows_file(rows)), "kind": "instruction", **data},
                "model": {"path": str(model_folder)},
                "objective": {"name": objective},
                "federation": {"clients": 1},
                "partition": {"client_test_fraction": 0.0},
            }
        )
        console = Console(
            width=200, force_terminal=colours, color_system="truecolor" if colours else None
        )
        with console.capture() as captured:
            console.print(show_row(experiment, number))
        return captured.get()

    return show


def row(question, answer):
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer},
        ]
    }


def test_a_row_as_tokens(shown):
    text = shown([row(f"What {i}?", f"It is {i}.") for i in range(4)], 1)
    assert re.search(r"example 1 of 3, instruction, \S*rows.jsonl row \d", text)
    assert "rows.jsonl: layout messages" in text
    assert "prompt  trained on  special" in text
    head, body = text.strip().splitlines()[-2:]
    pieces = body.replace("││", "│").split("│")
    assert (
        head
        == f"prompt and completion: {len(pieces)} tokens, {len(body.split('││')[1].split('│'))} trained on"
    )
    assert pieces[0] == "<s>" and pieces[-1] == "</s>"
    prompt, answer = (half.replace("│", "") for half in body.split("││"))
    assert re.fullmatch(r"<s>user: What \d\?\\nassistant:", prompt)
    assert re.fullmatch(r" It is \d\.</s>", answer)


def test_a_row_of_several_files_is_named_by_its_own(model_folder, rows_file):
    """Its number is counted in its file, as every other message counts it."""
    files = [
        rows_file([row(f"{name} {i}?", "So it is.") for i in range(5)], f"{name}.jsonl")
        for name in ("one", "two")
    ]
    experiment = Experiment.from_table(
        {
            "data": {"source": [str(file) for file in files], "kind": "instruction"},
            "model": {"path": str(model_folder)},
            "objective": {"name": "sft"},
            "federation": {"clients": 1},
            "partition": {"client_test_fraction": 0.0},
        }
    )
    console = Console(width=400)
    for number in range(8):
        with console.capture() as captured:
            console.print(show_row(experiment, number))
        text = captured.get()
        found = re.search(r"(one|two)\.jsonl row (\d)", text)
        counted = int(re.search(r"(?:one|two) (\d)", text.replace("│", ""))[1])
        assert int(found[2]) == counted + 1 and f"{found[1]} {counted}" in text.replace("│", "")


def test_colours_tell_prompt_answer_and_special_tokens_apart(shown):
    from rich.style import Style

    text = shown([row(f"What {i}?", f"It is {i}.") for i in range(4)], colours=True)
    for style in (PROMPT, TRAINED, SPECIAL):
        assert Style.parse(style).render("x", color_system=None) == "x"
        code = Style.parse(style).render("x").split("x")[0]
        assert code and code in text


def test_what_max_length_cuts(shown):
    long = [row(f"What {i}? " + "and " * 40, f"It is {i}.") for i in range(4)]
    text = shown(long, max_length=24)
    assert (
        found := re.search(
            r"cut to data.max_length = 24: (\d+) tokens of the prompt's start, 0", text
        )
    )
    before, after = (int(n) for n in re.findall(r"prompt and completion: (\d+) tokens", text))
    assert after == 24 and before == 24 + int(found[1])


def test_a_row_of_which_nothing_is_trained_on(shown):
    long = "the same words again and again " * 8
    rows = [{"prompt": f"Q{i}", "chosen": long + "yes", "rejected": long + "no"} for i in range(4)]
    text = shown(rows, kind="preference", objective="dpo", max_length=16)
    assert "it is left out: answers alike within data.max_length (data.max_length = 16)" in text
    assert "chosen:" in text and "rejected:" in text


def test_there_is_no_such_row(shown):
    with pytest.raises(DataError, match="--row 3: there are 3 training examples; give 0 to 2"):
        shown([row("What?", f"It {i}.") for i in range(4)], 3)
    with pytest.raises(
        DataError, match="rows are with the clients; each sees its own with fedloom client check"
    ):
        show_row(
            Experiment.from_table(
                {"data": {"source": "clients", "test_source": "x.jsonl", "kind": "instruction"},
                 "objective": {"name": "sft"}}
            ),
            0,
        )  # fmt: skip
