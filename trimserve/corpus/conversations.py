"""A row of messages as prompts and completions, the way that serving meets them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trimserve.corpus.documents import Document
from trimserve.corpus.schemas import Conversation, joined
from trimserve.errors import UsageError
from trimserve.text.chat import ChatTemplate, Message

_CONTEXT_CHARACTERS = 64
# A text that no template has of its own.
_PROBE = "\u2042trimserve\u2042"
# Of each template: whether it takes content in parts; and sequences of roles that it prints whole.
_PARTS: dict[str, bool] = {}
_SEQUENCES: set[tuple[str, ...]] = set()
_MAX_SEQUENCES = 4096


def conversation(template: ChatTemplate, given: Sequence[Message] | Conversation) -> Iterator[Document]:
    """Yield what each turn of a conversation adds: its prompt, then the assistant's completion.

    The prompt of a turn is what the template makes of the messages before it, with the opening of the
    answer; the completion is what the answer adds to that, the token that ends it included. What the
    prompt repeats of earlier turns is not counted again.

    Args:
        template: the model's own.
        given: the row's messages, oldest first; or with their tools.

    Raises:
        UsageError: the template refuses the messages, or prints nothing of one of them.
    """
    chat = given if isinstance(given, Conversation) else Conversation([dict(message) for message in given])
    messages = _for_template(template, chat.messages)
    variables: dict[str, Any] = {} if chat.tools is None else {"tools": chat.tools}
    pieces: list[tuple[str, bool]] = []
    seen = ""
    for number, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        prompt = template.render(messages[:number], **variables) if number else ""
        answered = template.render(messages[: number + 1], add_generation_prompt=False, **variables)
        if not answered.startswith(prompt):
            # Some templates write the opening otherwise when the answer follows (empty thinking).
            prompt = template.render(messages[:number], add_generation_prompt=False, **variables)
        pieces += [(_added(prompt, seen), False), (_added(answered, prompt), True)]
        seen = answered
    text = seen
    if _is_open(messages):
        text = template.render(messages, **variables)
        pieces.append((_added(text, seen), False))
    _check_printed(template, messages, text, variables)
    yield from _chained(pieces)


def _for_template(template: ChatTemplate, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with their text parts joined, for a template that would print the list as Python does."""
    if all(isinstance(message.get("content"), str) for message in messages) or _takes_parts(template):
        return messages
    return [
        message | {"content": joined(message["content"])} if message.get("content") is not None else message
        for message in messages
    ]


def _takes_parts(template: ChatTemplate) -> bool:
    if template.source not in _PARTS:
        try:
            text = template.render([{"role": "user", "content": [{"type": "text", "text": _PROBE}]}])
        except (UsageError, TypeError):
            text = ""
        _PARTS[template.source] = _PROBE in text and "{" not in text
    return _PARTS[template.source]


def _check_printed(
    template: ChatTemplate, messages: list[dict[str, Any]], text: str, variables: Mapping[str, Any]
) -> None:
    """Refuse messages of which the template prints nothing: they would be missing from the counts.

    Which messages a template prints follows from their roles, so these are tried once for each sequence of
    them; beyond that, a message whose text is not to be found is tried by itself.
    """
    roles = (template.source, *(str(message.get("role")) for message in messages))
    known = roles in _SEQUENCES
    for number, message in enumerate(messages):
        content = joined(message.get("content")).strip()
        if not content or (known and content in text):
            continue
        changed = [*messages[:number], message | {"content": _PROBE}, *messages[number + 1 :]]
        if template.render(changed, add_generation_prompt=_is_open(messages), **variables) == text:
            raise UsageError(
                f"the chat template prints nothing of message {number + 1} (role {message.get('role')!r}), "
                "whatever it says: mend the template, or take such messages out."
            )
    if len(_SEQUENCES) < _MAX_SEQUENCES:
        _SEQUENCES.add(roles)


def _is_open(messages: Sequence[Message]) -> bool:
    """Whether an answer is still to come."""
    return not messages or messages[-1].get("role") != "assistant"


def _added(text: str, before: str) -> str:
    return text.removeprefix(before)


def _chained(pieces: Sequence[tuple[str, bool]]) -> Iterator[Document]:
    context, part = "", 0
    for text, output in pieces:
        if text or part == 0:
            yield Document(text, part, context, output)
            context, part = (context + text)[-_CONTEXT_CHARACTERS:], part + 1
