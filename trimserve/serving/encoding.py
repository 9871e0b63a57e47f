"""/v1/embeddings, /v1/rerank and /v1/score: what encoders and rerankers say of texts."""

import base64
import secrets
import time
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from trimserve.arrays import Floats
from trimserve.encoder.encoder import Encoder
from trimserve.errors import UsageError
from trimserve.serving.fields import EmbeddingRequest, RerankRequest, ScoreRequest
from trimserve.serving.http import json_response, unless_gone
from trimserve.serving.inputs import Inputs, read_inputs
from trimserve.serving.models import ServedModel
from trimserve.serving.problems import bad_field
from trimserve.serving.settings import ServerSettings


async def answer_embeddings(
    request: Request, fields: EmbeddingRequest, served: ServedModel, settings: ServerSettings
) -> Response:
    """Embed texts, or token ids as they are.

    Raises:
        ApiError: 400, a field that cannot be honoured.
    """
    model = _embedder(served)
    if fields.dimensions is not None and fields.dimensions > model.dimension:
        raise bad_field(
            "dimensions",
            f"dimensions is {fields.dimensions:,}, and an embedding has {model.dimension:,}: ask for fewer.",
        )
    inputs = _inputs(fields, model, settings.max_inputs)
    texts, ids = inputs.texts, inputs.ids
    prompt = _prompt(fields, model, by_ids=bool(ids))
    sequences = ids or await served.in_thread(model.token_ids, [prompt + text for text in texts])
    tokens = sum(len(sequence) for sequence in sequences)

    def work() -> Floats:
        if ids:
            return model.encode_ids(ids, truncate_dim=fields.dimensions)
        return model.encode(texts, prompt=prompt, truncate_dim=fields.dimensions)

    embeddings = await unless_gone(request, served.run(work, tokens))
    shown = [_shown(row, fields.encoding_format) for row in embeddings]
    data = [{"object": "embedding", "index": index, "embedding": row} for index, row in enumerate(shown)]
    return json_response({"object": "list", "data": data, "model": served.name, "usage": _usage(tokens)})


def _embedder(served: ServedModel) -> Encoder:
    model = served.encoder("/v1/embeddings")
    if model.settings.is_sparse or model.task != "feature-extraction":
        what = "is a sparse encoder" if model.settings.is_sparse else f"does {model.task}"
        raise bad_field("model", f"{served.name} {what}, and gives no embeddings: name another model.")
    return model


def _inputs(fields: EmbeddingRequest, model: Encoder, most: int) -> Inputs:
    inputs = read_inputs("input", fields.input, vocab_size=model.folder.vocab.vocab_size, most=most)
    longest = max((ids.size for ids in inputs.ids), default=0)
    if model.max_tokens is not None and longest > model.max_tokens:
        raise bad_field(
            "input",
            f"input has {longest:,} token ids in a row, this model reads {model.max_tokens:,}: shorten it.",
        )
    return inputs


def _prompt(fields: EmbeddingRequest, model: Encoder, *, by_ids: bool) -> str:
    """The text that is put before each text."""
    if by_ids:
        if fields.prompt_name is not None:
            raise bad_field(
                "prompt_name", "a prompt cannot be put before token ids: send texts, or leave it out."
            )
        return ""
    try:
        return model.settings.prompt(fields.prompt_name, None)
    except UsageError as error:
        raise bad_field("prompt_name", str(error)) from error


def _shown(row: Floats, format_: str) -> str | list[float]:
    """An embedding as numbers, or as base64 of its little-endian float32 bytes."""
    if format_ == "base64":
        return base64.b64encode(row.astype("<f4").tobytes()).decode("ascii")
    numbers: list[float] = row.tolist()
    return numbers


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": tokens, "total_tokens": tokens}


async def answer_rerank(
    request: Request, fields: RerankRequest, served: ServedModel, settings: ServerSettings
) -> Response:
    """Sort documents by their score with a query, the best first.

    Raises:
        ApiError: 400, a field that cannot be honoured.
    """
    model = served.encoder("/v1/rerank")
    documents = [_document(place, one) for place, one in enumerate(fields.documents)]
    _check_count("documents", documents, settings.max_inputs)
    pairs = [(fields.query, document) for document in documents]
    tokens = await _pair_tokens(served, model, pairs)

    def work() -> list[Any]:
        return list(model.rank(fields.query, documents, top_k=fields.top_n))

    ranked = await unless_gone(request, served.run(work, tokens))
    results = [
        {"index": one["corpus_id"], "relevance_score": one["score"]}
        | ({"document": {"text": documents[one["corpus_id"]]}} if fields.return_documents else {})
        for one in ranked
    ]
    id_ = f"rerank-{secrets.token_hex(12)}"
    return json_response({"id": id_, "model": served.name, "results": results, "usage": _usage(tokens)})


def _document(place: int, document: str | dict[str, Any]) -> str:
    match document:
        case str(text) | {"text": str(text)}:
            return text
    raise bad_field("documents", f"documents[{place}] should be a text, or an object with a text: mend it.")


async def answer_score(
    request: Request, fields: ScoreRequest, served: ServedModel, settings: ServerSettings
) -> Response:
    """Score pairs of texts: a reranker's score, or the similarity of an embedder's embeddings.

    Raises:
        ApiError: 400, a field that cannot be honoured.
    """
    model = served.encoder("/v1/score")
    pairs = _pairs(fields)
    _check_count("text_2", pairs, settings.max_inputs)
    embeds = model.task == "feature-extraction" and not model.settings.is_sparse
    if embeds:
        firsts, seconds = (list(part) for part in zip(*pairs, strict=True))
        sequences = await served.in_thread(model.token_ids, [*firsts, *seconds])
        tokens = sum(map(len, sequences))
    else:
        tokens = await _pair_tokens(served, model, pairs)

    def work() -> Floats:
        if embeds:
            return model.similarity_pairwise(model.encode(firsts), model.encode(seconds))
        return model.predict(pairs)

    scores = await unless_gone(request, served.run(work, tokens))
    if scores.ndim > 1:
        raise bad_field(
            "model", f"{served.name} scores {scores.shape[1]} labels, not pairs: name another model."
        )
    data = [
        {"index": index, "object": "score", "score": score} for index, score in enumerate(scores.tolist())
    ]
    id_ = f"score-{secrets.token_hex(12)}"
    head = {"id": id_, "object": "list", "created": int(time.time()), "model": served.name}
    return json_response(head | {"data": data, "usage": _usage(tokens)})


def _pairs(fields: ScoreRequest) -> list[tuple[str, str]]:
    """Each of the first texts with its second; a single text goes with every other."""
    firsts, seconds = (
        [texts] if isinstance(texts, str) else texts for texts in (fields.text_1, fields.text_2)
    )
    if len(firsts) == 1:
        firsts = firsts * len(seconds)
    if len(firsts) != len(seconds):
        raise bad_field(
            "text_2",
            f"text_1 has {len(firsts):,} texts and text_2 {len(seconds):,}: send as many, or one text_1.",
        )
    return list(zip(firsts, seconds, strict=True))


async def _pair_tokens(served: ServedModel, model: Encoder, pairs: Sequence[tuple[str, str]]) -> int:
    return sum(map(len, await served.in_thread(model.token_ids, pairs)))


def _check_count(param: str, entries: Sequence[object], most: int) -> None:
    if len(entries) > most:
        raise bad_field(
            param, f"{param} has {len(entries):,} entries, and {most:,} may come at a time: send it in parts."
        )
