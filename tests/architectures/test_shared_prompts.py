"""Every causal model type: whether prompts are read once, and the same loss and gradient either way.

One is tried by every run, a drawn dozen by the slow suite, all by the full one.
"""

import pytest
import transformers

from architectures.shared_prompts import HEADER, TABLE, line, read
from architectures.table import DOCUMENT, lines
from architectures.zoo import MODEL_TYPES, make_folder
from sampling import sampled

# Other people's code: transformers warns as it likes when it loads what is checked here.
pytestmark = pytest.mark.filterwarnings("ignore")

CLOSE = 1e-5
"""Difference of the gradient at most, over its norm."""


@pytest.fixture
def reading_of(model_folder, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(model_folder))

    def look(model_type):
        make_folder(model_type, tmp_path / "model", tokenizer)
        return read(tmp_path / "model")

    return look


def in_table():
    """Return how each model type reads prompts by the table."""
    rows = TABLE.read_text(encoding="utf-8").partition(HEADER)[2].splitlines()[2:]
    return {row.split("|")[1].strip(): row.split("|")[2].strip() for row in rows}


def check(model_type, reading):
    found = line(model_type, reading).split("|")[2].strip()
    known = in_table()[model_type]
    for message in (
        "log-probs differ",
        "gradients differ",
    ):  # by so much that no machine finds none
        if message in known:
            found, known = found.partition(message)[0], known.partition(message)[0]
    assert found == known
    assert reading.loss < CLOSE and reading.gradient < CLOSE


def test_a_model_type(reading_of):
    check("gpt_neo", reading_of("gpt_neo"))


@pytest.mark.parametrize("model_type", sampled(MODEL_TYPES, 3))
def test_any_model_type(reading_of, model_type):
    check(model_type, reading_of(model_type))


def test_the_table_has_every_model_type_that_is_taken():
    table = in_table()
    assert sorted(table) == MODEL_TYPES
    taken = lines(DOCUMENT.read_text(encoding="utf-8"))
    refused = {name for name, row in taken.items() if "refused" in row.split("|")[2]}
    assert {name for name, row in table.items() if row == "not taken"} == refused
    once = sum(row == "once" for row in table.values())
    text = f"{len(table)} model types, of which {len(table) - len(refused)} are taken and {once} read prompts once"
    assert text in TABLE.read_text(encoding="utf-8")
