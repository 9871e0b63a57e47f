"""/tokenize and /detokenize: the model's tokens of a text, and back (vLLM's shape)."""

from typing import Any

import numpy as np
from starlette.responses import Response

from trimserve.arrays import Ids
from trimserve.encoder.encoder import Encoder
from trimserve.serving.chat import chat_ids
from trimserve.serving.fields import DetokenizeRequest, TokenizeRequest
from trimserve.serving.http import json_response
from trimserve.serving.models import ServedModel
from trimserve.serving.problems import bad_field

# Of a conversation alone, and of a text alone.
_OF_CHATS = ("add_generation_prompt", "chat_template_kwargs")
_OF_TEXTS = ("add_special_tokens",)


async def answer_tokenize(fields: TokenizeRequest, served: ServedModel) -> Response:
    """The token ids that a text or a conversation becomes.

    Raises:
        ApiError: 400, neither or both of them, or a field that means nothing to it.
    """
    if (fields.prompt is None) == (fields.messages is None):
        raise bad_field(
            "prompt", "one of prompt and messages should be given: send a text, or a conversation."
        )
    for name in _OF_CHATS if fields.messages is None else _OF_TEXTS:
        if getattr(fields, name) is not None:
            about = "conversations" if fields.messages is None else "texts"
            raise bad_field(name, f"{name} is about {about}: leave it out.")
    ids = await served.in_thread(_ids, fields, served)
    found: dict[str, Any] = {"count": ids.size, "max_model_len": longest(served), "tokens": ids.tolist()}
    if fields.return_token_strs:
        found["token_strs"] = [served.texts.text(id_) for id_ in ids.tolist()]
    return json_response(found)


def _ids(fields: TokenizeRequest, served: ServedModel) -> Ids:
    if fields.messages is not None:
        return chat_ids(
            served.generator("/tokenize of messages"),
            fields.messages,
            fields.chat_template_kwargs or {},
            add_generation_prompt=fields.add_generation_prompt is not False,
        )
    (ids,) = served.model.codec.encode(
        [fields.prompt or ""], add_special_tokens=fields.add_special_tokens is not False
    )
    return ids


def longest(served: ServedModel) -> int | None:
    """Tokens that the model reads at most; None for no limit."""
    model = served.model
    return model.max_tokens if isinstance(model, Encoder) else model.config.context


async def answer_detokenize(fields: DetokenizeRequest, served: ServedModel) -> Response:
    """The text of token ids, special tokens included.

    Raises:
        ApiError: 400, an id that the model does not have.
    """
    size = served.model.folder.vocab.vocab_size
    if wrong := next((id_ for id_ in fields.tokens if id_ >= size), None):
        raise bad_field("tokens", f"tokens holds the id {wrong:,}, but ids go from 0 to {size - 1:,}.")
    ids = np.array(fields.tokens, np.int32)
    return json_response(
        {"prompt": await served.in_thread(served.model.codec.decode, ids, skip_special_tokens=False)}
    )
