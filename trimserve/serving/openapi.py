"""/openapi.json: the routes and their fields, from the same types that check requests."""

from functools import cache
from typing import Any, Final, NamedTuple

import msgspec

from trimserve.serving.fields import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    Fields,
    RerankRequest,
    ScoreRequest,
    TokenizeRequest,
)
from trimserve.version import __version__


class Described(NamedTuple):
    """A route that takes a body.

    Attributes:
        fields: its body.
        summary: what it does.
        media: of its answer.
    """

    fields: type[Fields]
    summary: str
    media: tuple[str, ...] = ("application/json",)


_STREAMS: Final = ("application/json", "text/event-stream")
_POSTS: Final = {
    "/v1/chat/completions": Described(ChatRequest, "answer a conversation", _STREAMS),
    "/v1/completions": Described(CompletionRequest, "go on from texts or token ids", _STREAMS),
    "/v1/embeddings": Described(EmbeddingRequest, "embed texts or token ids"),
    "/v1/rerank": Described(RerankRequest, "sort documents by their score with a query"),
    "/v1/score": Described(ScoreRequest, "score pairs of texts"),
    "/tokenize": Described(TokenizeRequest, "token ids of a text or a conversation"),
    "/detokenize": Described(DetokenizeRequest, "the text of token ids"),
}
_GETS: Final = {
    "/health": ("the process is alive", "application/json"),
    "/ready": (
        "every model can be asked; 503 while they are opened, and while the server ends",
        "application/json",
    ),
    "/metrics": ("counts for Prometheus", "text/plain"),
    "/openapi.json": ("this description", "application/json"),
    "/v1/models": ("the models", "application/json"),
}
_ERRORS: Final = {
    "400": "a field is unknown, wrong or not supported; the error's param names it",
    "401": "no API key, or a wrong one",
    "404": "no such model",
    "413": "the request is too long",
    "429": "the queue is full; retry-after says when to come again",
    "500": "the server failed",
    "503": "the model is being opened, or the server ends",
}


@cache
def describe() -> dict[str, Any]:
    """The description, OpenAPI 3.1."""
    kinds = [described.fields for described in _POSTS.values()]
    _, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    paths: dict[str, Any] = {path: {"post": _post(described)} for path, described in _POSTS.items()}
    paths |= {path: {"get": _get(summary, media)} for path, (summary, media) in _GETS.items()}
    paths["/v1/models/{name}"] = {
        "get": _get("one model", "application/json")
        | {"parameters": [{"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}]}
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "trimserve", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {**components, "Error": _error_schema()},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _post(described: Described) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{described.fields.__name__}"}
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {"summary": described.summary, "requestBody": body, "responses": _responses(described.media)}


def _get(summary: str, media: str) -> dict[str, Any]:
    return {"summary": summary, "responses": _responses((media,))}


def _responses(media: tuple[str, ...]) -> dict[str, Any]:
    good = {"description": "the answer", "content": {kind: {"schema": {}} for kind in media}}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {"200": good} | {
        status: {"description": text, "content": error} for status, text in _ERRORS.items()
    }


def _error_schema() -> dict[str, Any]:
    maybe = {"type": ["string", "null"]}
    fields = {"message": {"type": "string"}, "type": {"type": "string"}, "param": maybe, "code": maybe}
    error = {"type": "object", "properties": fields, "required": sorted(fields)}
    return {"type": "object", "properties": {"error": error}, "required": ["error"]}
