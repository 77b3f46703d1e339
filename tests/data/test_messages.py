"""Conversations as people keep them: contents in parts, tools and their calls, ShareGPT; and what is refused."""

import json

import pytest

from fedloom.data.messages import checked_messages, checked_tools
from fedloom.data.row_parsing import make_example
from fedloom.data.rows import RowError

SCHEMA = {"name": "clock", "parameters": {"type": "object", "properties": {}}}
WRAPPED = {"type": "function", "function": SCHEMA}


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def call(arguments, **more):
    return {"type": "function", **more, "function": {"name": "clock", "arguments": arguments}}


TALK = [
    said("developer", "Be brief."),
    said("user", [{"type": "text", "text": "Now?"}]),
    said("assistant", None, tool_calls=[call('{"zone": "CET"}', id="c1")]),
    said("tool", "12:00", tool_call_id="c1", name="clock"),
    said("assistant", "Noon.", reasoning_content="12 is noon."),
]


def test_a_conversation_with_tools_is_kept_as_chat_templates_take_it():
    made = make_example("instruction", 1, {"messages": TALK, "tools": json.dumps([SCHEMA])})
    assert made.prompt == (
        said("developer", "Be brief."),
        said("user", [{"type": "text", "text": "Now?"}]),
    )
    assert made.completion == (
        said("assistant", None, tool_calls=[call({"zone": "CET"}, id="c1")]),
        {"role": "tool", "content": "12:00", "name": "clock", "tool_call_id": "c1"},
        said("assistant", "Noon.", reasoning_content="12 is noon."),
    )
    assert made.tools == (WRAPPED,)
    again = make_example("instruction", 1, {"messages": TALK, "tools": [SCHEMA]})
    assert repr(again) == repr(made)  # caches are found by it


def test_messages_in_a_table_are_json_text():
    talk = chat("q", "a")
    made = make_example("instruction", 1, {"messages": json.dumps(talk)})
    assert made == make_example("instruction", 1, {"messages": talk})
    with pytest.raises(RowError, match="messages must be JSON, got "):
        make_example("instruction", 1, {"messages": str(talk)})


def test_text_parts_of_the_other_names():
    (message,) = checked_messages([said("user", [{"type": "input_text", "text": "x"}])], "messages")
    assert message["content"] == [{"type": "text", "text": "x"}]


def test_the_answer_may_be_a_call():
    made = make_example("instruction", 1, {"messages": TALK[:3]})
    assert made.completion[0]["tool_calls"][0]["function"]["arguments"] == {"zone": "CET"}
    assert made.completion[0]["content"] is None


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ('{"a": 1}', {"a": 1}),
        ({"a": None}, {"a": None}),
        ("CET", "CET"),  # text that is not an object stays text
        ("[1]", "[1]"),
        (None, {}),
    ],
)
def test_arguments(given, kept):
    (message,) = checked_messages([said("assistant", None, tool_calls=[call(given)])], "messages")
    assert message["tool_calls"][0]["function"]["arguments"] == kept


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            r'{"a": "\ud800"}',
            r"'a': holds \ud800, half of a pair of surrogates, which is not a character",
        ),
        ('{"a": NaN}', "holds NaN, which is not a number in JSON; write null, or a number"),
        ('{"a": 1, "a": 2}', "the key 'a' stands twice in an object"),
        ('{"a": ' + "[" * 5000 + "]" * 5000 + "}", "nested deeper than 100 brackets"),
        ('{"a": 1e999}', "holds the number 1e999, which is too large"),
        (
            '{"a": ' + "7" * 4000 + "}",
            "holds a whole number of 4\u202f000 digits; at most 100 are read",
        ),
    ],
)
def test_json_in_a_text_is_read_by_the_rules_of_rows(text, reason):
    answer = said("assistant", None, tool_calls=[call(text)])
    row = {"messages": [said("user", "Now?"), answer]}
    with pytest.raises(RowError) as caught:
        make_example("instruction", 1, row)
    assert str(caught.value) == f"message 2 of messages: arguments of 'clock': {reason}"
    assert caught.value.malformed
    with pytest.raises(RowError) as caught:
        checked_tools(f'[{{"name": "clock", "parameters": {text}}}]')
    assert str(caught.value) == f"tools: {reason}".replace("'a': holds \\u", "holds \\u")
    with pytest.raises(RowError, match=r"^message 1 of talk: "):
        checked_messages([{"from": "function_call", "value": text}], "talk")
    with pytest.raises(RowError, match=r"^talk: "):
        checked_messages(f'[{{"role": "user", "content": {text}}}]', "talk")


def test_arguments_that_are_no_object_are_text_whatever_they_look_like():
    for text in ("NaN", "7" * 4000, "Infinity", '{"a"', "[NaN]"):
        answer = said("assistant", None, tool_calls=[call(text)])
        (message,) = checked_messages([answer], "messages")
        assert message["tool_calls"][0]["function"]["arguments"] == text


def test_tools_of_parquet_hold_no_empty_keys():
    padded = {"type": "function", "function": {**SCHEMA, "strict": None}}
    assert checked_tools([padded]) == (WRAPPED,)
    assert checked_tools(None) == checked_tools("") == checked_tools([]) == ()


def test_tools_beside_plain_text_are_a_column_like_any_other():
    made = make_example("instruction", 1, {"prompt": "p", "completion": "c", "tools": "hammer"})
    assert made.tools == () and made.columns == {"tools": "hammer"}


def test_sharegpt_with_calls_and_a_system_beside():
    rows = [
        {"from": "human", "value": "Now?"},
        {"from": "function_call", "value": '{"name": "clock", "arguments": {}}'},
        {"from": "observation", "value": "12:00"},
        {"from": "gpt", "value": "Noon."},
    ]
    made = make_example("instruction", 1, {"conversations": rows, "system": "Be brief."})
    assert made.prompt == (
        said("system", "Be brief."),
        said("user", "Now?"),
    )
    assert made.completion == (
        said("assistant", None, tool_calls=[call({})]),
        said("tool", "12:00"),
        said("assistant", "Noon."),
    )


def deep(levels):
    value = {}
    for _ in range(levels):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            said("user", [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {}}]),
            "message 1 of messages holds an image_url part; fedloom trains text",
        ),
        (said("user", [{"type": "video"}]), "message 1 of messages holds a video part; fedloom"),
        (said("user", "x", images=["a.png"]), "message 1 of messages holds images; fedloom trains"),
        (said("user", [{"type": "text", "text": 3}]), "has a text part whose text is 3"),
        (said("user", [{"image": "a.png"}]), "not an object with a type, got {'image': 'a.png'}"),
        (said("user", ["x"]), "has a part that is not an object with a type, got 'x'"),
        (said("user", None), "role and content are needed, its content is None"),
        (said("user", 3), "role and content are needed, its content is 3"),
        (said("wizard", "x"), "message 1 of messages has the role 'wizard', not user, assistant"),
        (said(["user"], "x"), r"has the role \['user'\]"),
        (said("assistant", None, tool_calls="clock"), "tool_calls must be a list, got 'clock'"),
        (said("assistant", None, tool_calls=[{"function": {}}]), "a call must be"),
        (
            said("assistant", None, tool_calls=[call(3)]),
            "arguments of 'clock' must be text or an object, got 3",
        ),
        (said("assistant", None, tool_calls=[call(deep(40))]), "more than 32 levels deep"),
        (said("user", "x", tool_calls=[call({})]), "is of the role 'user' and calls tools"),
        (said("tool", "x", name=3), "name must be text, got 3"),
        ({"from": "function_call", "value": "clock()"}, "must be JSON, got 'clock"),
    ],
)
def test_what_is_no_message_of_text_is_refused_by_name(message, reason):
    with pytest.raises(RowError, match=reason):
        checked_messages([message], "messages")


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ("clock", "tools must be JSON, got 'clock'"),
        (3, "tools must be a list of JSON schemas, got 3"),
        ([{"type": "function"}], "tool 1 of tools must be a JSON schema with a name"),
        ([{**SCHEMA, "parameters": deep(40)}], "more than 32 levels deep"),
    ],
)
def test_what_is_no_schema_is_refused(tools, reason):
    with pytest.raises(RowError, match=reason):
        checked_tools(tools)


def test_an_answer_that_says_nothing_is_refused():
    for content in ("", " ", []):
        with pytest.raises(RowError, match="messages: the last message is empty"):
            make_example(
                "instruction", 1, {"messages": [said("user", "a"), said("assistant", content)]}
            )


def test_pictures_beside_a_conversation_are_refused():
    row = {"messages": [said("user", "<image>"), said("assistant", "A cat.")], "images": ["a.png"]}
    with pytest.raises(RowError, match="images beside messages; fedloom trains text"):
        make_example("instruction", 1, row)
    assert make_example("instruction", 1, {**row, "images": []}).prompt == (
        said("user", "<image>"),
    )


def chat(*texts):
    return [said(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": chat("q", "a"), "rejected": chat("q", "b")},  # UltraFeedback
        {"prompt": chat("q"), "chosen": chat("q", "a"), "rejected": chat("q", "b")},
        {"prompt": chat("q"), "chosen": chat("q", "a")[1:], "rejected": chat("q", "b")[1:]},
        {"prompt": "q", "chosen": chat("q", "a")[1:], "rejected": chat("q", "b")[1:]},
        {"prompt": chat("q"), "chosen": "a", "rejected": "b"},
        {"messages": chat("q"), "chosen": "a", "rejected": "b"},
        {
            "conversations": [{"from": "human", "value": "q"}],  # LLaMA-Factory
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        {"chosen": chat("q", "a"), "rejected": chat("q", "b")},
    ],
)
def test_prompt_and_answers_are_brought_into_one_form(row):
    made = make_example("preference", 1, row)
    assert (made.prompt, made.chosen, made.rejected) == (
        (said("user", "q"),),
        (said("assistant", "a"),),
        (said("assistant", "b"),),
    )


def test_single_answers_are_too():
    row = {"prompt": "q", "completion": chat("q", "a")}
    made = make_example("instruction", 1, row)
    assert (made.prompt, made.completion) == ((said("user", "q"),), (said("assistant", "a"),))
    made = make_example("feedback", 1, {"prompt": chat("q"), "completion": "a", "label": True})
    assert (made.prompt, made.completion) == ((said("user", "q"),), (said("assistant", "a"),))


def test_a_conversation_without_its_prompt_is_refused():
    row = {"prompt": "other", "chosen": chat("q", "a"), "rejected": chat("q", "b")}
    with pytest.raises(RowError, match="chosen and rejected hold conversations without the prompt"):
        make_example("preference", 1, row)
