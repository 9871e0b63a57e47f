"""The ASGI application: routes, keys, and errors in one shape."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trimserve.engine.errors import EngineClosed, QueueFull
from trimserve.errors import TrimserveError
from trimserve.serving.bodies import parse_fields, read_body
from trimserve.serving.chat import answer_chat
from trimserve.serving.completions import answer_completion
from trimserve.serving.encoding import answer_embeddings, answer_rerank, answer_score
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
from trimserve.serving.http import GoneError, json_response
from trimserve.serving.keys import Keys
from trimserve.serving.metrics import Metrics
from trimserve.serving.models import Models
from trimserve.serving.openapi import describe
from trimserve.serving.problems import ApiError, as_api_error
from trimserve.serving.settings import ServerSettings
from trimserve.serving.tokenizing import answer_detokenize, answer_tokenize, longest

# What a probe asks without a key.
_OPEN_ROUTES = ("/health", "/ready")
_CLIENT_HAS_GONE = 499  # nginx's word for it; nobody reads it
Failure = Callable[[BaseException], None]


def create_app(settings: ServerSettings, on_failure: Failure | None = None) -> "App":
    """Make the application; its models are opened when a server starts it.

    Args:
        settings: see `ServerSettings`.
        on_failure: called with the error if a folder cannot be opened; such a server never becomes ready.
    """
    return App(settings, on_failure)


class App:
    """The application.

    Attributes:
        models: its models.
    """

    def __init__(self, settings: ServerSettings, on_failure: Failure | None = None) -> None:
        self.models = Models(settings)
        self._settings = settings
        self._on_failure = on_failure
        self._metrics = Metrics(self.models)
        handlers: dict[Any, Any] = {
            ApiError: _api_error,
            QueueFull: _queue_full,
            EngineClosed: _engine_closed,
            TrimserveError: _library_error,
            HTTPException: _http_error,
            GoneError: _gone,
            Exception: _unforeseen,
        }
        routed = Starlette(routes=self._routes(), exception_handlers=handlers, lifespan=self._lifespan)
        self._app = _Door(routed, Keys(settings.keys), self._metrics)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI's entry."""
        await self._app(scope, receive, send)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        working = asyncio.create_task(self._open_and_watch())
        try:
            yield
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
            await self.models.close()

    async def _open_and_watch(self) -> None:
        try:
            await self.models.open_all()
        except Exception as error:
            if self._on_failure is None:
                raise
            self._on_failure(error)
            return
        if self._settings.reload:
            await self.models.watch()

    def _routes(self) -> list[BaseRoute]:
        settings, models = self._settings, self.models

        def post(path: str, kind: type[Fields], answer: Callable[..., Awaitable[Response]]) -> Route:
            async def endpoint(request: Request) -> Response:
                fields: Any = parse_fields(await read_body(request, settings.max_body), kind)
                async with contextlib.AsyncExitStack() as closing:
                    served = closing.enter_context(models.choose(fields.model).in_use())
                    return await answer(request, fields, served, closing)

            return Route(path, endpoint, methods=["POST"])

        return [
            Route("/health", self._health),
            Route("/ready", self._ready),
            Route("/metrics", self._show_metrics),
            Route("/openapi.json", self._describe),
            Route("/v1/models", self._list_models),
            Route("/v1/models/{name:path}", self._show_model),
            post(
                "/v1/chat/completions",
                ChatRequest,
                lambda request, fields, served, closing: answer_chat(
                    request, fields, served, settings, self._metrics, closing
                ),
            ),
            post(
                "/v1/completions",
                CompletionRequest,
                lambda request, fields, served, closing: answer_completion(
                    request, fields, served, settings, self._metrics, closing
                ),
            ),
            post(
                "/v1/embeddings",
                EmbeddingRequest,
                lambda request, fields, served, _: answer_embeddings(request, fields, served, settings),
            ),
            post(
                "/v1/rerank",
                RerankRequest,
                lambda request, fields, served, _: answer_rerank(request, fields, served, settings),
            ),
            post(
                "/v1/score",
                ScoreRequest,
                lambda request, fields, served, _: answer_score(request, fields, served, settings),
            ),
            post("/tokenize", TokenizeRequest, lambda _, fields, served, __: answer_tokenize(fields, served)),
            post(
                "/detokenize",
                DetokenizeRequest,
                lambda _, fields, served, __: answer_detokenize(fields, served),
            ),
        ]

    async def _health(self, _: Request) -> Response:
        return json_response({"status": "ok"})

    async def _ready(self, _: Request) -> Response:
        if self.models.ready:
            return json_response({"status": "ready"})
        why = "draining" if self.models.draining else "loading"
        return json_response({"status": why}, 503, {"retry-after": "1"})

    async def _show_metrics(self, _: Request) -> Response:
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _describe(self, _: Request) -> Response:
        return json_response(describe())

    async def _list_models(self, _: Request) -> Response:
        return json_response({"object": "list", "data": [self._card(name) for name in self.models.served]})

    async def _show_model(self, request: Request) -> Response:
        name = self.models.choose(request.path_params["name"]).name
        return json_response(self._card(name))

    def _card(self, name: str) -> dict[str, Any]:
        served = self.models.served[name]
        folder, metrics = served.model.folder, served.engine.metrics()
        return {
            "id": name,
            "object": "model",
            "created": served.created,
            "owned_by": "trimserve",
            "max_model_len": longest(served),
            "task": served.task,
            "source": folder.manifest.source.name,
            "vocab_size": folder.manifest.vocab_size,
            "kept": folder.manifest.kept,
            "strict": metrics.strict,
            "batching": metrics.batching,
        }


class _Door:
    """What every request passes: keys before, counting after."""

    def __init__(self, app: ASGIApp, keys: Keys, metrics: Metrics) -> None:
        self._app = app
        self._keys = keys
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500

        async def counted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            if scope["path"] in _OPEN_ROUTES or self._keys.open(_authorization(scope)):
                await self._app(scope, receive, counted)
            else:
                refusal = ApiError(
                    401,
                    "this server wants an API key: send it as 'Authorization: Bearer KEY'.",
                    code="invalid_api_key",
                )
                await _answered(refusal)(scope, receive, counted)
        finally:
            # The path as it is routed: names that somebody makes up are one.
            route = scope["path"] if "endpoint" in scope else "other"
            self._metrics.count_answer(route, status)


def _authorization(scope: Scope) -> str | None:
    values = [value for name, value in scope["headers"] if name == b"authorization"]
    return values[0].decode("latin-1") if len(values) == 1 else None


def _answered(error: ApiError) -> Response:
    return json_response(error.body, error.status, error.headers)


async def _api_error(_: Request, error: ApiError) -> Response:
    return _answered(error)


async def _library_error(_: Request, error: TrimserveError) -> Response:
    return _answered(as_api_error(error))


async def _queue_full(_: Request, error: QueueFull) -> Response:
    retry = max(1, round(error.retry_after))
    return _answered(ApiError(429, str(error), code="queue_full", retry_after=retry))


async def _engine_closed(_: Request, error: EngineClosed) -> Response:
    return _answered(ApiError(503, str(error), code="draining", retry_after=1))


async def _http_error(request: Request, error: HTTPException) -> Response:
    """No such route, or not by this method."""
    message = (
        f"{request.method} {request.url.path[:200]}: {error.detail}. GET /openapi.json describes the routes."
    )
    return json_response(ApiError(error.status_code, message).body, error.status_code, error.headers)


async def _gone(_: Request, __: GoneError) -> Response:
    return Response(status_code=_CLIENT_HAS_GONE)


async def _unforeseen(_: Request, error: Exception) -> Response:
    return _answered(ApiError(500, f"the server failed: {type(error).__name__}. Its log says more."))
