"""A row of messages as prompts and completions, the way that serving meets them."""

from collections.abc import Iterator, Sequence

from trimserve.corpus.documents import Document
from trimserve.text.chat import ChatTemplate, Message

_CONTEXT_CHARACTERS = 64


def conversation(template: ChatTemplate, messages: Sequence[Message]) -> Iterator[Document]:
    """Yield what each turn of a conversation adds: its prompt, then the assistant's completion.

    The prompt of a turn is what the template makes of the messages before it, with the opening of the
    answer; the completion is what the answer adds to that, the token that ends it included. What the
    prompt repeats of earlier turns is not counted again.

    Args:
        template: the model's own.
        messages: the row's messages, oldest first.

    Raises:
        UsageError: the template refuses the messages.
    """
    pieces: list[tuple[str, bool]] = []
    seen = ""
    for number, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        prompt = template.render(messages[:number]) if number else ""
        answered = template.render(messages[: number + 1], add_generation_prompt=False)
        if not answered.startswith(prompt):
            # Some templates write the opening otherwise when the answer follows (empty thinking).
            prompt = template.render(messages[:number], add_generation_prompt=False)
        pieces += [(_added(prompt, seen), False), (_added(answered, prompt), True)]
        seen = answered
    if not messages or messages[-1].get("role") != "assistant":
        pieces.append((_added(template.render(messages), seen), False))
    yield from _chained(pieces)


def _added(text: str, before: str) -> str:
    return text.removeprefix(before)


def _chained(pieces: Sequence[tuple[str, bool]]) -> Iterator[Document]:
    context, part = "", 0
    for text, output in pieces:
        if text or part == 0:
            yield Document(text, part, context, output)
            context, part = (context + text)[-_CONTEXT_CHARACTERS:], part + 1
