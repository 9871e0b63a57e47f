"""A request's fields as the library's generation options, and the prompts as token ids."""

import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Final

from trimserve.arrays import Ids
from trimserve.engine.settings import GenerationRequest
from trimserve.errors import UsageError
from trimserve.generation.generator import Generator
from trimserve.serving.fields import Sampling
from trimserve.serving.problems import ApiError, bad_field

# Fields that have the library's own name and meaning.
_SAME: Final = (
    *("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("mode", "stop"),
)
# What only sampling reads: nothing to a greedy answer where it keeps everything.
_KEEPS_ALL: Final[Mapping[str, Any]] = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
_SEEDS: Final = 2**64


def generation_options(request: Sampling, model: Generator, *, max_tokens: int) -> dict[str, Any]:
    """The options of `Generator.generate` that a request asks for, without a seed.

    Args:
        request: the fields.
        model: whose generation settings hold for what the request leaves out.
        max_tokens: of an answer.

    Raises:
        ApiError: 400, a field that cannot be honoured; its name is the error's param.
    """
    given = {name: value for name in _SAME if (value := getattr(request, name)) is not None}
    if request.top_k is not None:
        given["top_k"] = max(request.top_k, 0)
    if request.logit_bias:
        given["logit_bias"] = _read_bias(request.logit_bias)
    given["max_new_tokens"] = max_tokens
    try:
        return _planned(given, model)
    except UsageError as error:
        raise about_field(error, request) from error


def _planned(given: dict[str, Any], model: Generator) -> dict[str, Any]:
    """The options as they can be planned: a filter that keeps everything is no filter to a greedy answer."""
    kept = {name: value for name, value in given.items() if _KEEPS_ALL.get(name) != value}
    if model.plan(kept).params.temperature > 0:  # type: ignore[arg-type]
        kept = given
    model.plan(kept)  # type: ignore[arg-type]
    return kept


def _read_bias(bias: Mapping[str, float]) -> dict[int, float]:
    try:
        return {int(token_id): value for token_id, value in bias.items()}
    except ValueError as error:
        raise bad_field(
            "logit_bias", f"logit_bias should have token ids as its keys ({error}): give numbers."
        ) from error


def about_field(error: UsageError, request: Sampling) -> ApiError:
    """An option's error, whose sentence begins with its name, as an error of the field."""
    word = str(error).partition(" ")[0]
    name = {"max_new_tokens": "max_tokens"}.get(word, word)
    return ApiError(400, str(error), param=name if name in request.__struct_fields__ else None)


def engine_requests(
    request: Sampling, prompts: Sequence[Ids], options: Mapping[str, Any], top_logprobs: int | None
) -> list[GenerationRequest]:
    """One engine request a choice: `n` of the first prompt, then of the next.

    Choice i is sampled with the seed plus i, so that each can be had again by itself; without a seed they
    begin at a random one.
    """
    first = secrets.randbits(63) if request.seed is None else request.seed
    choices = [prompt for prompt in prompts for _ in range(request.n)]
    return [
        GenerationRequest(prompt, {**options, "seed": (first + place % request.n) % _SEEDS}, top_logprobs)
        for place, prompt in enumerate(choices)
    ]


def answer_limit(asked: int | None, model: Generator, default: int) -> int:
    """Most tokens of an answer: what is asked for, else what the folder says, else the server's default."""
    if asked is not None:
        return asked
    folder = model.config.settings.get("max_new_tokens")
    return default if folder is None else int(folder)
