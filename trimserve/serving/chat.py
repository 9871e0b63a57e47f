"""/v1/chat/completions: a conversation through the folder's own chat template."""

import json
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from trimserve.arrays import Ids
from trimserve.engine.events import Finished, Piece
from trimserve.errors import UsageError
from trimserve.generation.generator import Generator
from trimserve.serving.answers import Answer
from trimserve.serving.choices import Choices, finish_reason
from trimserve.serving.fields import ChatRequest
from trimserve.serving.metrics import Metrics
from trimserve.serving.models import ServedModel
from trimserve.serving.options import answer_limit, engine_requests, generation_options
from trimserve.serving.problems import ApiError, bad_field
from trimserve.serving.settings import ServerSettings
from trimserve.text.chat import chat_templates, render_chat

ROUTE = "/v1/chat/completions"


class ChatChoices(Choices):
    """The answers to a conversation."""

    fields: ChatRequest
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:  # noqa: ARG002 - of some shapes
        """A finished choice."""
        end = answer.end
        logprobs = self.served.texts.chat_logprobs(answer.logprobs) if self.fields.logprobs else None
        ids = {"token_ids": list(end.generation.ids)} if self.fields.return_token_ids else {}
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return {"message": message, "logprobs": logprobs, "finish_reason": finish_reason(end), **ids}

    def opening(self, index: int) -> dict[str, Any]:  # noqa: ARG002
        """Who speaks."""
        return _delta({"role": "assistant", "content": ""})

    def chunk(self, index: int, piece: Piece) -> dict[str, Any] | None:  # noqa: ARG002
        """More of the text."""
        extra: dict[str, Any] = {"token_ids": list(piece.ids)} if self.fields.return_token_ids else {}
        if self.fields.logprobs:
            extra["logprobs"] = self.served.texts.chat_logprobs(piece.logprobs)
        return _delta({"content": piece.text}, **extra) if piece.text or extra else None

    def ending(self, index: int, end: Finished) -> dict[str, Any]:  # noqa: ARG002
        """The text's rest, and why it ended."""
        return _delta({"content": end.text} if end.text else {}, reason=finish_reason(end))

    def _of_prompt(self) -> dict[str, Any]:
        return {"prompt_token_ids": self.prompts[0].tolist()} if self.fields.return_token_ids else {}


def _delta(delta: dict[str, Any], *, reason: str | None = None, **extra: Any) -> dict[str, Any]:  # noqa: ANN401
    return {"delta": delta, "logprobs": None, "finish_reason": reason, **extra}


async def answer_chat(
    request: Request,
    fields: ChatRequest,
    served: ServedModel,
    settings: ServerSettings,
    metrics: Metrics,
    closing: AsyncExitStack,
) -> Response:
    """Answer a conversation.

    Raises:
        ApiError: 400, a field that cannot be honoured.
    """
    model = served.generator(ROUTE)
    if fields.top_logprobs is not None and not fields.logprobs:
        raise bad_field("top_logprobs", "top_logprobs needs logprobs: set it to true, or leave both out.")
    if fields.stream_options is not None and not fields.stream:
        raise bad_field(
            "stream_options", "stream_options is about streams: set stream to true, or leave it out."
        )
    limit = answer_limit(_max_tokens(fields), model, settings.max_tokens)
    options = generation_options(fields, model, max_tokens=limit)
    prompts = [await served.in_thread(chat_ids, model, fields.messages, fields.chat_template_kwargs or {})]
    top = (fields.top_logprobs or 0) if fields.logprobs else None
    choices = ChatChoices(served, fields, prompts, engine_requests(fields, prompts, options, top))
    return await choices.respond(request, metrics, closing)


def _max_tokens(fields: ChatRequest) -> int | None:
    old, new = fields.max_tokens, fields.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise bad_field(
            "max_tokens", "max_tokens and max_completion_tokens limit the same: give one of them."
        )
    return old if new is None else new


def chat_ids(
    model: Generator,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    *,
    add_generation_prompt: bool = True,
) -> Ids:
    """The prompt of a conversation, int32 (T,).

    Raises:
        ApiError: 400, the messages are not what the template takes.
    """
    plain = [plain_message(place, message, model) for place, message in enumerate(messages)]
    if clash := {"messages", "add_generation_prompt"} & variables.keys():
        raise bad_field(
            "chat_template_kwargs", f"chat_template_kwargs must not hold {min(clash)}: leave it out."
        )
    try:
        prompt = render_chat(model.folder, plain, add_generation_prompt=add_generation_prompt, **variables)
    except UsageError as error:
        raise ApiError(400, str(error), param="messages") from error
    # The template writes the special tokens itself.
    (ids,) = model.codec.encode([prompt], add_special_tokens=False)
    return ids


def plain_message(place: int, message: Mapping[str, Any], model: Generator) -> dict[str, Any]:
    """A message as chat templates expect it: texts joined, arguments parsed, developer for system."""
    where = f"messages[{place}]"
    if not isinstance(message.get("role"), str):
        raise bad_field("messages", f"{where} should have a role that is a text: give it one such as 'user'.")
    plain = {**message, "content": _text_of(message.get("content"), where)}
    if plain["role"] == "developer" and not _template_knows(model, "developer"):
        plain["role"] = "system"  # OpenAI's newer word for it
    if calls := message.get("tool_calls"):
        plain["tool_calls"] = [_plain_call(call, where) for call in calls]
    return plain


def _template_knows(model: Generator, word: str) -> bool:
    return any(word in source for source in chat_templates(model.folder).values())


def _text_of(content: object, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_field("messages", f"{where}.content should be a text or a list of parts: send a text.")
    texts: list[str] = []
    for part in content:
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case {"type": str(kind)}:
                raise bad_field(
                    "messages",
                    f"{where}.content has a part of type {kind[:40]!r}: this model reads text alone.",
                )
            case _:
                raise bad_field("messages", f"{where}.content has a part without a type: send texts.")
    return "\n".join(texts)


def _plain_call(call: object, where: str) -> dict[str, Any]:
    """A tool call whose arguments are an object, as templates print it, and not JSON text."""
    match call:
        case {"function": {"name": str(), "arguments": str(arguments)} as function}:
            try:
                parsed = json.loads(arguments)
            except ValueError as error:
                raise bad_field(
                    "messages", f"{where} has a tool call whose arguments are no JSON: mend it."
                ) from error
            return {**call, "function": {**function, "arguments": parsed}}  # type: ignore[dict-item]
        case {"function": {"name": str()}}:
            return dict(call)  # type: ignore[call-overload,no-any-return]
    raise bad_field("messages", f"{where} has a tool call without a function and its name: mend it.")
