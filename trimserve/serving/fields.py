"""The fields of each request: those that are read, and those that are known and not honoured.

A request with a field that would be ignored is refused, by name. A known field may stand there with a value
that asks for nothing: clients send those.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

Text = Annotated[str, Meta(min_length=1)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
# A text, token ids, or a list of either: see `inputs`.
Input = str | Annotated[list[Any], Meta(min_length=1)]
OneOrMore = Annotated[int, Meta(ge=1)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Share = Annotated[float, Meta(ge=0, le=1)]
Answers = Annotated[int, Meta(ge=1, le=128)]
Top = Annotated[int, Meta(ge=0, le=20)]


class Fields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields of a request."""


class StreamOptions(Fields, kw_only=True):
    """What a stream ends with."""

    include_usage: bool = False


class Sampling(Fields, kw_only=True):
    """How tokens are chosen; what is left out is as the folder's generation settings have it.

    `top_k`, `min_p`, `repetition_penalty` and `mode` are the library's own; `return_token_ids` adds the
    token ids of prompt and answer to it.
    """

    model: Text | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=2**31)] | None = None
    min_p: Share | None = None
    n: Answers = 1
    stop: Text | Annotated[list[Text], Meta(max_length=64)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    logit_bias: dict[str, Bias] | None = None
    mode: Literal["exact", "compact"] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False
    user: str | None = None


class ChatRequest(Sampling, kw_only=True):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    max_tokens: OneOrMore | None = None
    max_completion_tokens: OneOrMore | None = None
    logprobs: bool = False
    top_logprobs: Top | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(Sampling, kw_only=True):
    """Body of /v1/completions."""

    prompt: Input
    max_tokens: OneOrMore | None = None
    logprobs: Top | None = None
    echo: bool = False
    add_special_tokens: bool = True


class EmbeddingRequest(Fields, kw_only=True):
    """Body of /v1/embeddings; `prompt_name` is one of the folder's prompts (sentence-transformers' word)."""

    model: Text | None = None
    input: Input
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: OneOrMore | None = None
    prompt_name: Text | None = None
    user: str | None = None


class RerankRequest(Fields, kw_only=True):
    """Body of /v1/rerank: documents to be sorted by their score with a query (Cohere's and Jina's shape)."""

    model: Text | None = None
    query: str
    documents: Annotated[list[str | dict[str, Any]], Meta(min_length=1)]
    top_n: OneOrMore | None = None
    return_documents: bool = False
    user: str | None = None


class ScoreRequest(Fields, kw_only=True):
    """Body of /v1/score: the score of each pair, or of one text with each of several (vLLM's shape)."""

    model: Text | None = None
    text_1: str | Annotated[list[str], Meta(min_length=1)]
    text_2: str | Annotated[list[str], Meta(min_length=1)]
    user: str | None = None


class TokenizeRequest(Fields, kw_only=True):
    """Body of /tokenize: a text, or a conversation that the folder's chat template is put around."""

    model: Text | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool = False
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(Fields, kw_only=True):
    """Body of /detokenize."""

    model: Text | None = None
    tokens: list[TokenId]


# Known to clients and not honoured -> the values that ask for nothing, beside null.
_GENERATION: Final[Mapping[str, tuple[Any, ...]]] = {
    "best_of": (1,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "include_stop_str_in_output": (False,),
    "ignore_eos": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "prompt_logprobs": (),
    "length_penalty": (1, 1.0),
    "use_beam_search": (False,),
    "priority": (0,),
    "cache_salt": (),
    "service_tier": ("auto", "default"),
}
_CHAT: Final[Mapping[str, tuple[Any, ...]]] = {
    "audio": (),
    "function_call": ("none",),
    "functions": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "prediction": (),
    "reasoning_effort": (),
    "safety_identifier": (),
    "prompt_cache_key": (),
    "store": (False,),
    "verbosity": (),
    "web_search_options": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "documents": (),
    "chat_template": (),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True,),
}
NOT_HONOURED: Final[Mapping[type[Fields], Mapping[str, tuple[Any, ...]]]] = {
    ChatRequest: {**_GENERATION, **_CHAT},
    CompletionRequest: {**_GENERATION, "suffix": ("",)},
    EmbeddingRequest: {
        "truncate_prompt_tokens": (),
        "add_special_tokens": (True,),
        "embed_dtype": ("float32",),
    },
    RerankRequest: {"max_tokens_per_doc": (), "max_chunks_per_doc": (), "rank_fields": (["text"],)},
    ScoreRequest: {"truncate_prompt_tokens": ()},
    TokenizeRequest: {"continue_final_message": (False,), "tools": ([],)},
    DetokenizeRequest: {},
}
