"""LangChain's interfaces over trimmed folders: `Embeddings` and a chat model."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

from trimserve.arguments import AnyPath
from trimserve.encoder.encoder import Encoder
from trimserve.errors import MissingExtraError
from trimserve.generation.generator import Generator
from trimserve.generation.output import Generation
from trimserve.integrations.messages import message, open_encoder, open_generator

try:
    from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
    from langchain_core.embeddings import Embeddings
    from langchain_core.language_models import BaseChatModel
    from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
    from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
    from pydantic import PrivateAttr
except ModuleNotFoundError as error:
    raise MissingExtraError(
        f"trimserve.integrations.langchain needs {error.name}, which is not installed. Install it with: "
        "pip install 'trimserve[langchain]'"
    ) from error

_ROLES = {"system": "system", "human": "user", "ai": "assistant"}


class TrimserveEmbeddings(Embeddings):
    """Embeddings of a trimmed folder, with its prompts for queries and for documents where it has them.

    Example:
        >>> embeddings = TrimserveEmbeddings("minilm-tickets")  # doctest: +SKIP
        >>> len(embeddings.embed_query("where is my refund?"))  # doctest: +SKIP
        384

    Attributes:
        model: the `trimserve.Encoder`.
    """

    def __init__(self, folder: AnyPath, **options: Any) -> None:
        self.model: Encoder = open_encoder(folder, options)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Embed texts that are searched."""
        found: list[list[float]] = self.model.encode_document(texts).tolist()
        return found

    def embed_query(self, text: str) -> list[float]:
        """Embed a text that is searched for."""
        found: list[float] = self.model.encode_query(text)[0].tolist()
        return found


class ChatTrimserve(BaseChatModel):
    """A chat with a trimmed folder, through its own chat template, in exact mode where it can.

    Options of a call, and of `bind`, are those of `trimserve.GenerationOptions`; `stop` is LangChain's.

    Example:
        >>> chat = ChatTrimserve("smollm2-tickets")  # doctest: +SKIP
        >>> chat.invoke("Where is my refund?", max_new_tokens=64).content  # doctest: +SKIP
    """

    _model: Generator = PrivateAttr()

    def __init__(self, folder: AnyPath, **options: Any) -> None:
        super().__init__()
        self._model = open_generator(folder, options)

    @property
    def _llm_type(self) -> str:
        return "trimserve"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        return {"folder": str(self._model.folder.path)}

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,  # noqa: ARG002 - there is one token at a time in _stream
        **options: Any,
    ) -> ChatResult:
        return _result(self._model, self._model.chat(_rendered(messages), **_with(options, stop)))

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,  # noqa: ARG002
        **options: Any,
    ) -> ChatResult:
        return _result(self._model, await self._model.achat(_rendered(messages), **_with(options, stop)))

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **options: Any,
    ) -> Iterator[ChatGenerationChunk]:
        for piece in self._model.stream_chat(_rendered(messages), **_with(options, stop)):
            chunk = ChatGenerationChunk(message=AIMessageChunk(content=piece))
            if run_manager is not None:
                run_manager.on_llm_new_token(piece, chunk=chunk)
            yield chunk

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **options: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        async for piece in self._model.astream_chat(_rendered(messages), **_with(options, stop)):
            chunk = ChatGenerationChunk(message=AIMessageChunk(content=piece))
            if run_manager is not None:
                await run_manager.on_llm_new_token(piece, chunk=chunk)
            yield chunk


def _rendered(messages: list[BaseMessage]) -> list[dict[str, str]]:
    return [message(each.type, each.content, _ROLES) for each in messages]


def _with(options: dict[str, Any], stop: list[str] | None) -> dict[str, Any]:
    return options | ({"stop": stop} if stop else {})


def _result(model: Generator, made: Generation) -> ChatResult:
    told = {
        "finish_reason": "length" if made.stopped == "length" else "stop",
        "model_name": model.folder.path.name,
    }
    answer = AIMessage(content=made.text, response_metadata=told)
    return ChatResult(generations=[ChatGeneration(message=answer)])
