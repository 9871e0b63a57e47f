"""/v1/completions: texts or token ids that the model goes on from."""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from trimserve.arrays import Ids
from trimserve.engine.events import Finished, Piece
from trimserve.generation.generator import Generator
from trimserve.serving.answers import Answer
from trimserve.serving.choices import Choices, finish_reason
from trimserve.serving.fields import CompletionRequest
from trimserve.serving.inputs import read_inputs
from trimserve.serving.metrics import Metrics
from trimserve.serving.models import ServedModel
from trimserve.serving.options import answer_limit, engine_requests, generation_options
from trimserve.serving.problems import bad_field
from trimserve.serving.settings import ServerSettings

ROUTE = "/v1/completions"
# Where a request says nothing, as OpenAI has it.
_DEFAULT_TOKENS = 16


class CompletionChoices(Choices):
    """Texts that go on."""

    fields: CompletionRequest
    object = "text_completion"
    chunk_object = "text_completion"
    id_prefix = "cmpl"

    def __init__(self, *args: Any, echoes: Sequence[str]) -> None:  # noqa: ANN401 - those of Choices
        """Begin; `echoes` are the prompts' texts, which go before the answers where they are asked for."""
        super().__init__(*args)
        self._echoes = echoes
        self._given = [len(self._echo(index)) for index in range(len(self.requests))]

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """A finished choice."""
        ids = list(answer.end.generation.ids)
        extra = {"token_ids": ids} | self._prompt_ids(index) if self.fields.return_token_ids else {}
        text = self._echo(index) + answer.text
        return {
            "text": text,
            "logprobs": self._logprobs(index, answer),
            "finish_reason": finish_reason(answer.end),
            **extra,
        }

    def opening(self, index: int) -> dict[str, Any] | None:
        """The prompt's text, where it is asked for."""
        extra = self._prompt_ids(index) if self.fields.return_token_ids else {}
        if not self.fields.echo and not extra:
            return None
        return {"text": self._echo(index), "logprobs": None, "finish_reason": None, **extra}

    def chunk(self, index: int, piece: Piece) -> dict[str, Any] | None:
        """More of the text."""
        extra = {"token_ids": list(piece.ids)} if self.fields.return_token_ids else {}
        logprobs = self._logprobs(index, piece)
        self._given[index] += len(piece.text)
        if not piece.text and not extra and logprobs is None:
            return None
        return {"text": piece.text, "logprobs": logprobs, "finish_reason": None, **extra}

    def ending(self, index: int, end: Finished) -> dict[str, Any]:  # noqa: ARG002 - of some shapes
        """The text's rest, and why it ended."""
        return {"text": end.text, "logprobs": None, "finish_reason": finish_reason(end)}

    def _echo(self, index: int) -> str:
        return self._echoes[index // self.fields.n] if self.fields.echo else ""

    def _prompt_ids(self, index: int) -> dict[str, Any]:
        return {"prompt_token_ids": self.prompt_of(index).tolist()}

    def _logprobs(self, index: int, part: Answer | Piece) -> dict[str, Any] | None:
        if self.fields.logprobs is None:
            return None
        return self.served.texts.completion_logprobs(
            part.logprobs, top=self.fields.logprobs, start=self._given[index]
        )


async def answer_completion(
    request: Request,
    fields: CompletionRequest,
    served: ServedModel,
    settings: ServerSettings,
    metrics: Metrics,
    closing: AsyncExitStack,
) -> Response:
    """Let the model go on from each prompt.

    Raises:
        ApiError: 400, a field that cannot be honoured.
    """
    model = served.generator(ROUTE)
    if fields.echo and fields.logprobs is not None:
        raise bad_field("logprobs", "logprobs of the prompt are not given: leave out echo, or logprobs.")
    if fields.stream_options is not None and not fields.stream:
        raise bad_field(
            "stream_options", "stream_options is about streams: set stream to true, or leave it out."
        )
    limit = answer_limit(fields.max_tokens, model, min(_DEFAULT_TOKENS, settings.max_tokens))
    options = generation_options(fields, model, max_tokens=limit)
    prompts, texts = await served.in_thread(read_prompts, model, fields, settings.max_inputs)
    requests = engine_requests(fields, prompts, options, fields.logprobs)
    return await CompletionChoices(served, fields, prompts, requests, echoes=texts).respond(
        request, metrics, closing
    )


def read_prompts(model: Generator, fields: CompletionRequest, most: int) -> tuple[list[Ids], list[str]]:
    """The prompts of a request, int32 (T,) each, and their texts where they are shown."""
    size = model.folder.vocab.vocab_size
    inputs = read_inputs("prompt", fields.prompt, vocab_size=size, most=most)
    if inputs.texts:
        return model.codec.encode(inputs.texts, add_special_tokens=fields.add_special_tokens), inputs.texts
    return inputs.ids, [model.codec.decode(ids) for ids in inputs.ids] if fields.echo else []
