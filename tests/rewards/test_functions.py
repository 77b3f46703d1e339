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


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("a{1000000000}", "repeats too much"),
        ("(?:a{30}|b){40}", "repeats too much"),
        ("(?:" * 40 + "a" + "+)" * 40 + "+", "repeats too much"),  # doubled forty times
        ("(?:" * 20 + "a" + r"\\)" + ")+" * 20, "repeats too much"),
        ("(" * 3000, "has 3000 characters"),
        ("a" * 501, "has 501 characters"),
        ("(a+)(?#)+", "has a comment or the flag x"),
        ("(?ix)a{1 0 0 0 0 0 0}", "has a comment or the flag x"),
        ("(?R)?a", "calls a group anew"),
        ("(a(?1))", "calls a group anew"),
        ("(?P<n>b(?&n))", "calls a group anew"),
        ("(?P<n>b(?P>n))", "calls a group anew"),
    ],
)
def test_a_pattern_is_bounded_before_it_is_compiled(monkeypatch, pattern, text):
    monkeypatch.setattr("fedloom.rewards.functions.regex.compile", lambda own: 1 / 0)
    assert text in fault_of(f"regex:{pattern}")


def test_flags_that_exclude_each_other_are_a_fault():
    assert "holds no regular expression: ASCII, LOCALE and" in fault_of("regex:(?a)(?u)b")


def test_groups_too_deep_are_a_fault(monkeypatch):
    def compiled(text):
        raise RecursionError

    monkeypatch.setattr("fedloom.rewards.functions.regex.compile", compiled)
    assert "too many groups within each other" in fault_of("regex:(a)")


@pytest.mark.parametrize(
    "pattern", [r"^\{\"sum\": ?[0-9]+\}$", "(?:[a-z]+ ){1,40}[a-z]+", "(?P<x>a+)+b*?", "a{1000}"]
)
def test_usual_patterns_are_taken(pattern):
    assert not fault_of(f"regex:{pattern}")
