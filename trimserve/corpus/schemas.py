"""The shapes that rows of conversations have, and the one that chat templates read.

OpenAI's `messages`, ShareGPT's `conversations` (from/value, human/gpt), `prompt` and `completion`, each as
lists or as JSON in a string. Whatever is not understood is refused by its name: a row is counted whole or not
at all.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeAlias

from trimserve.errors import UsageError

Row: TypeAlias = Mapping[str, Any]
Parts: TypeAlias = Sequence[Mapping[str, Any]]

# Fields with a whole conversation; the first that a row has counts.
CHAT_FIELDS: Final = ("messages", "conversations", "conversation")
PROMPT, COMPLETION = "prompt", "completion"
# Fields beside the conversation that templates print.
_TOOLS, _SYSTEM = "tools", "system"
FIELDS: Final = (*CHAT_FIELDS, PROMPT, COMPLETION, _TOOLS, _SYSTEM)
# What templates call a role <- what data sets call it.
_ROLES: Final = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool", "function", "ipython")},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "ai"), "assistant"),
    **dict.fromkeys(("observation", "tool_response", "function_response"), "tool"),
}
_FRAME: Final = (("role", "content"), ("from", "value"))
_LISTED_ROLES: Final = "system, user, assistant, tool, or ShareGPT's human and gpt"


class Conversation(NamedTuple):
    """What a template renders: messages with `role` and `content`, and the tools they may call."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None


def field_of(row: object) -> str:
    """The field of a row that holds its conversation, by the shapes that are known."""
    fields = (
        name for name in (*CHAT_FIELDS, PROMPT) if isinstance(row, Mapping) and row.get(name) is not None
    )
    return next(fields, CHAT_FIELDS[0])


def read_conversation(row: Row, field: str, value: object) -> Conversation:
    """Read the conversation of a row, whichever shape it has.

    Args:
        row: a record.
        field: the field that holds the conversation; of prompt and completion, the prompt.
        value: what is in it.

    Raises:
        UsageError: a part of it is not understood; the message names that part.
    """
    if field == PROMPT and row.get(COMPLETION) is not None:
        given = [*_side(value, PROMPT, "user"), *_side(row[COMPLETION], COMPLETION, "assistant")]
    else:
        given = _listed(value, field)
    messages = [_message(message, number) for number, message in enumerate(given, 1)]
    system = row.get(_SYSTEM)
    if isinstance(system, str) and system and messages and messages[0]["role"] != _SYSTEM:
        messages.insert(0, {"role": _SYSTEM, "content": system})
    tools = row.get(_TOOLS)
    return Conversation(messages, _listed(tools, _TOOLS) if tools else None)


def _side(value: object, field: str, role: str) -> Sequence[Any]:
    """A prompt or a completion: text of one message, or messages."""
    if isinstance(value, str) and not value.lstrip().startswith("["):
        return [{"role": role, "content": value}]
    try:
        return _listed(value, field)
    except UsageError:
        if isinstance(value, str):  # text that begins with a bracket
            return [{"role": role, "content": value}]
        raise


def _listed(value: object, field: str) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise UsageError(
                f"field {field!r} should hold a list of records, or one as JSON, but is text ({error})."
            ) from error
    if isinstance(value, Mapping):  # {"messages": [...]} within the field
        value = next((value[name] for name in CHAT_FIELDS if name in value), value)
    if not isinstance(value, list) or not all(isinstance(entry, Mapping) for entry in value):
        raise UsageError(f"field {field!r} should be a list of messages but is {_kind(value)}.")
    return value


def _message(message: Row, number: int) -> dict[str, Any]:
    """A message as templates read it; what parquet fills in for absent keys is left out."""
    keys = next((keys for keys in _FRAME if keys[0] in message), None)
    if keys is None:
        raise UsageError(f"message {number} has neither 'role' nor 'from' (it has {_names(message)}).")
    role, content = message[keys[0]], message.get(keys[1])
    if not isinstance(role, str) or role.lower() not in _ROLES:
        raise UsageError(f"message {number} has the role {role!r}: expected {_LISTED_ROLES}.")
    others = {key: value for key, value in message.items() if key not in keys and value is not None}
    if content is None and not others.get("tool_calls"):
        raise UsageError(f"message {number} ({role}) has no {keys[1]!r} (it has {_names(message)}).")
    return {"role": _ROLES[role.lower()], "content": _content(content, number)} | others


def _content(content: object, number: int) -> str | Parts | None:
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, Mapping):
        content = [content]
    if not isinstance(content, list):
        raise UsageError(f"message {number} should say text but holds {type(content).__name__}.")
    return [_part(part, number) for part in content]


def _part(part: object, number: int) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    text = part.get("text") if isinstance(part, Mapping) else None
    if kind not in ("text", "input_text", "output_text", None) or not isinstance(text, str):
        raise UsageError(f"message {number} holds a part of type {kind!r}: only text can be counted.")
    return {"type": "text", "text": text}


def joined(content: str | Parts | None) -> str:
    """The text of a message, as for a template that takes text alone."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part["text"] for part in content)


def _names(message: Row) -> str:
    return ", ".join(map(repr, message)) or "nothing"


def _kind(value: object) -> str:
    if isinstance(value, list):
        strange = next(type(entry).__name__ for entry in value if not isinstance(entry, Mapping))
        return f"a list that holds {strange}"
    return type(value).__name__
