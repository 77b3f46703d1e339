"""What is said in a conversation, and what goes along when an example changes its kind."""

from fedloom.data.examples import (
    Feedback,
    Instruction,
    Preference,
    as_choice,
    plain_text,
    unpair,
)

TOOLS = ({"type": "function", "function": {"name": "clock", "parameters": {}}},)


def test_a_conversation_as_text_is_what_is_said_and_called():
    call = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "Zürich"}}}
    messages = (
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Now?"}, {"type": "text", "text": "!"}],
        },
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": "clock", "content": "12:00"},
        {"role": "assistant", "content": "Noon.", "reasoning_content": "12 is noon."},
    )
    assert plain_text(messages) == ('Be brief.\nNow?\n!\nclock({"zone": "Zürich"})\n12:00\nNoon.')
    assert plain_text("as it is\n") == "as it is\n"


def test_tools_go_along():
    pair = Preference(3, "p", "a", "b", {"site": "A"}, TOOLS)
    assert unpair([pair]) == [
        Feedback(3, "p", "a", True, {"site": "A"}, TOOLS),
        Feedback(3, "p", "b", False, {"site": "A"}, TOOLS),
    ]
    assert as_choice(Instruction(1, "p", "a", tools=TOOLS), ["a", "b"]).tools == TOOLS
