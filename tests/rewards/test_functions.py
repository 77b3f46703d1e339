"""Rewards that are checked: hand-written texts, and functions of the user's."""

import pytest

from fedloom.errors import PluginError, SettingsError
from fedloom.rewards.functions import fault_of, is_harmless, last_number, reward


@pytest.mark.parametrize(
    ("name", "answer", "reference", "expected"),
    [
        ("exact_match", " 42\n", "42", 1),
        ("exact_match", "42.0", "42", 0),
        ("number", "so it is 1,234.50", "#### 1234.5", 1),
        ("number", "3 and then 4", "3", 0),
        ("number", "none", "none", 0),
        ("number", "-7", "7", 0),
        ("regex:^[0-9]{2}$", "42", "", 1),
        ("regex:^[0-9]{2}$", "421", "", 0),
    ],
)
def test_by_hand(name, answer, reference, expected):
    assert reward(name)("a prompt", answer, reference) == expected


def test_the_last_number_is_read():
    assert [last_number(text) for text in ("1 2", "x", "2.50.", "1,000,000")] == [
        2,
        None,
        2.5,
        10**6,
    ]


def test_a_function_of_the_users(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_rewards.py").write_text(
        "def short(prompt, answer, reference):\n    return 1 / (1 + len(answer))\n"
        "def bad(prompt, answer, reference):\n    return float('nan')\n"
        "def worse(prompt, answer, reference):\n    return answer.index('?')\n"
    )
    assert reward("own_rewards:short")("", "abc", "") == 0.25
    with pytest.raises(PluginError, match="own_rewards:bad returned nan: it must be a number"):
        reward("own_rewards:bad")("", "a", "")
    with pytest.raises(PluginError, match="own_rewards:worse failed: ValueError"):
        reward("own_rewards:worse")("", "a", "")
    with pytest.raises(SettingsError, match="has no function 'gone'"):
        reward("own_rewards:gone")


def test_what_cannot_be_is_told_before_anything_is_imported():
    assert "did you mean 'number'" in fault_of("numbr")
    assert "holds no regular expression" in fault_of("regex:(")
    assert not fault_of("not_there:at_all") and not is_harmless("not_there:at_all")
    assert is_harmless("regex:x") and is_harmless("number") and not is_harmless("unit_tests")
    with pytest.raises(SettingsError, match="no module not_there here"):
        reward("not_there:at_all")


def test_a_pattern_that_never_ends_is_an_error():
    with pytest.raises(PluginError, match="took more than 1 s on an answer of 40 characters"):
        reward(r"regex:^(a|aa|a?a)*$")("", "a" * 39 + "b", "")
