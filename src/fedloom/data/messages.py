"""Chat messages as people keep them, to messages as chat templates take them.

Known are OpenAI's form (``role``, ``content``, ``tool_calls``, ``tool_call_id``), with contents in parts
too, and ShareGPT's (``from``, ``value``; roles human, gpt, function_call, observation). In which order
roles may follow each other is the chat template's business; here the structure is checked.

The arguments of a call become an object where they are the text of one: that is what chat templates are
written for (https://huggingface.co/docs/transformers/main/en/chat_extras).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedloom.data.examples import Message, Tools
from fedloom.data.json_rows import json_value
from fedloom.data.rows import RowError, as_list, shown

ROLES = {
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
"""Roles, with the names of the ShareGPT layout and of OpenAI's older one."""

MEDIA = ("images", "image", "audios", "audio", "videos", "video")
"""Keys beside a message's text that hold what is not text."""

TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of parts that are text."""

DEEPEST = 32
"""Levels of lists and objects in the arguments of a call or in a tool's schema."""


def checked_messages(value: Any, name: str) -> tuple[Message, ...]:
    """Return a conversation as chat templates take it.

    Args:
        value: A list of messages in either form, one message alone, or JSON text of either (CSV).
        name: Of its column, for messages to the user.

    Raises:
        RowError: It is something else, or holds a picture, audio or video.
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        value = _parsed(value, name)
    value = as_list(value)
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list | tuple) or not value:
        raise RowError(f"{name} must be a list of messages, got {shown(value)}")
    return tuple(_message(item, f"message {i} of {name}", name) for i, item in enumerate(value, 1))


def checked_tools(value: Any) -> Tools:
    """Return the tools of a conversation: a list of JSON schemas, or JSON text of one.

    A schema alone (``name``, ``parameters``) is put into ``{"type": "function", "function": ...}``.

    Raises:
        RowError: It is something else.
    """
    value = _parsed(value, "tools") if isinstance(value, str) and value.strip() else value
    value = as_list(value) or []
    value = [value] if isinstance(value, dict) else value
    if not isinstance(value, list | tuple):
        raise RowError(f"tools must be a list of JSON schemas, got {shown(value)}")
    return tuple(_tool(_parsed(item, "tools"), i) for i, item in enumerate(value, 1))


def all_answers(
    messages: tuple[Message, ...], name: str = "messages"
) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Cut a conversation before its first answer to a user; what follows is the completion.

    Which of its answers are trained on is ``data.train_on``'s to say.
    """
    last_answer(messages, name)
    asked = next((i for i, message in enumerate(messages) if message["role"] == "user"), 0)
    first = next(i for i in range(asked, len(messages)) if messages[i]["role"] == "assistant")
    return messages[:first], messages[first:]


def last_answer(
    messages: tuple[Message, ...], name: str = "messages"
) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """Cut a conversation before its last assistant message, which is the completion."""
    if messages[-1]["role"] != "assistant":
        raise RowError(f"the last message must be the assistant's, got {messages[-1]['role']!r}")
    require_said(messages, name)
    return messages[:-1], messages[-1:]


def require_said(messages: Sequence[Message], name: str) -> None:
    """Refuse a conversation whose last message says and calls nothing.

    Raises:
        RowError: It does not.
    """
    last = messages[-1]
    content = last["content"]
    texts = [content] if isinstance(content, str) else [part["text"] for part in content or ()]
    if not any(text.strip() for text in texts) and not last.get("tool_calls"):
        raise RowError(f"{name}: the last message is empty")


def _message(item: Any, where: str, name: str) -> Message:
    needed = f"{name} must hold messages with role and content"
    if not isinstance(item, dict):
        raise RowError(f"{needed}, got {shown(item)}")
    given, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    role = ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise RowError(f"{needed}: {where} has the role {shown(given)}, not {', '.join(ROLES)}")
    for key in MEDIA:
        if as_list(item.get(key)):
            raise RowError(
                f"{where} holds {key}; fedloom trains text", cause=f"messages hold {key}"
            )
    calls = _calls(item, where)
    if given == "function_call":
        calls, content = _call_text(content, where), None
    if not (content is None and calls):
        content = _content(content, where)
    message: dict[str, Any] = {"role": role, "content": content}
    for key in ("reasoning_content", "name", "tool_call_id"):
        if item.get(key) is not None:
            if not isinstance(item[key], str):
                raise RowError(f"{where}: {key} must be text, got {shown(item[key])}")
            message[key] = item[key]
    if calls:
        if role != "assistant":
            raise RowError(f"{where} is of the role {given!r} and calls tools")
        message["tool_calls"] = calls
    return message


def _content(content: Any, where: str) -> str | list[dict[str, str]]:
    content = as_list(content)
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError(f"{where}: role and content are needed, its content is {shown(content)}")
    return [_part(part, where) for part in content]


def _part(part: Any, where: str) -> dict[str, str]:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise RowError(f"{where} has a part that is not an object with a type, got {shown(part)}")
    kind = part["type"]
    if kind in TEXT_PARTS and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind in TEXT_PARTS:
        raise RowError(f"{where} has a text part whose text is {shown(part.get('text'))}")
    article = "an" if kind[:1] in "aeiou" else "a"
    raise RowError(
        f"{where} holds {article} {kind} part; fedloom trains text", cause=f"parts of type {kind}"
    )


def _calls(item: dict[str, Any], where: str) -> list[dict[str, Any]]:
    """Return the calls of a message, OpenAI's older single ``function_call`` among them."""
    given = as_list(item.get("tool_calls"))
    if not given:
        given = [item["function_call"]] if item.get("function_call") else []
    if not isinstance(given, list | tuple):
        raise RowError(f"{where}: tool_calls must be a list, got {shown(given)}")
    return [_call(call, where) for call in given]


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(
            f'{where}: a call must be {{"function": {{"name": ..., "arguments": ...}}}}, '
            f"got {shown(call)}"
        )
    arguments = function.get("arguments")
    arguments = {} if arguments is None else arguments
    if isinstance(arguments, str):
        arguments = _object_or_text(arguments, f"{where}: arguments of {function['name']!r}")
    if not isinstance(arguments, dict | str):
        raise RowError(
            f"{where}: arguments of {function['name']!r} must be text or an object, "
            f"got {shown(arguments)}"
        )
    _require_shallow(arguments, f"{where}: arguments of {function['name']!r}")
    found: dict[str, Any] = {"type": "function"}
    if isinstance(call.get("id"), str):
        found["id"] = call["id"]
    return {**found, "function": {"name": function["name"], "arguments": arguments}}


def _call_text(content: Any, where: str) -> list[dict[str, Any]]:
    """Return the calls that a ShareGPT message holds as JSON text."""
    value = _parsed(content, where) if isinstance(content, str) else as_list(content)
    return [_call(call, where) for call in (value if isinstance(value, list) else [value])]


def _tool(tool: Any, number: int) -> dict[str, Any]:
    function = tool.get("function", tool) if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise RowError(
            f"tool {number} of tools must be a JSON schema with a name, got {shown(tool)}"
        )
    _require_shallow(tool, f"tool {number} of tools")
    whole: dict[str, Any] = _without_null(tool)
    return whole if "function" in whole else {"type": "function", "function": whole}


def _without_null(value: Any) -> Any:
    """Return a schema without keys that hold nothing, which Parquet gives every object of a column."""
    if isinstance(value, dict):
        return {key: _without_null(own) for key, own in value.items() if own is not None}
    value = as_list(value)
    return [_without_null(own) for own in value] if isinstance(value, list) else value


def _parsed(value: Any, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json_value(value)
    except RowError as error:
        raise RowError(f"{where}: {error}", cause=error.cause) from None
    except ValueError:
        raise RowError(f"{where} must be JSON, got {shown(value)}") from None


def _object_or_text(text: str, where: str) -> Any:
    if text.lstrip()[:1] != "{":
        return text
    try:
        return json_value(text)
    except RowError as error:
        raise RowError(f"{where}: {error}", cause=error.cause) from None
    except ValueError:
        return text


def _require_shallow(value: Any, where: str) -> None:
    level = [value]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise RowError(f"{where} are nested more than {DEEPEST} levels deep")
