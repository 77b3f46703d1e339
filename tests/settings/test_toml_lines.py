"""A number set in a file of TOML: every other line stays as it was, or the file is not touched."""

import tomllib

import pytest

from fedloom.errors import SettingsError
from fedloom.settings.toml import set_key


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "[training]\ntokens_per_pass = 7\n"),
        ("name = 'x'", "name = 'x'\n\n[training]\ntokens_per_pass = 7\n"),
        ("[training]\n", "[training]\ntokens_per_pass = 7\n"),
        ("[training]", "[training]\ntokens_per_pass = 7\n"),
        (
            "# mine\n[ training ]   # how\nseed = 1\n[data]\ntokens_per_pass = 1\n",
            "# mine\n[ training ]   # how\ntokens_per_pass = 7\nseed = 1\n[data]\ntokens_per_pass = 1\n",
        ),
        (
            '[training]\nx = 1\n  tokens_per_pass="auto"  # by width\ny = 2\n\n[a]\n',
            "[training]\nx = 1\n  tokens_per_pass = 7  # by width\ny = 2\n\n[a]\n",
        ),
        (
            "[training]\n# tokens_per_pass = 1\n",
            "[training]\ntokens_per_pass = 7\n# tokens_per_pass = 1\n",
        ),
        ("[training]\r\ntokens_per_pass = 1\r\n", "[training]\r\ntokens_per_pass = 7\r\n"),
        ("[training.a]\nx = 1\n", "[training.a]\nx = 1\n\n[training]\ntokens_per_pass = 7\n"),
        (
            "[a]\ntext = '''\n[b]\ntokens_per_pass = 1\n'''\n[training]\nz = [\n[1],\n]\n",
            "[a]\ntext = '''\n[b]\ntokens_per_pass = 1\n'''\n[training]\ntokens_per_pass = 7\nz = [\n[1],\n]\n",
        ),
    ],
)
def test_one_line_is_set_and_all_others_stay(before, after):
    assert set_key(before, "training", "tokens_per_pass", 7, "x.toml") == after
    assert tomllib.loads(after)["training"]["tokens_per_pass"] == 7


@pytest.mark.parametrize(
    "text",
    [
        "training = { tokens_per_pass = 1 }\n",
        "training.tokens_per_pass = 1\n",
        "[a]\ntext = '''\n[training]\n'''\n[training]\nx = 1\n",
        "[training]\nz = [\n[1],\n]\ntokens_per_pass = 1\n",
        "[training]\n'tokens_per_pass' = 1\n",
    ],
)
def test_what_cannot_be_told_by_lines_is_left_to_the_user(text):
    with pytest.raises(
        SettingsError, match=r"no line of \[training\] can be set to tokens_per_pass"
    ):
        set_key(text, "training", "tokens_per_pass", 7, "x.toml")
