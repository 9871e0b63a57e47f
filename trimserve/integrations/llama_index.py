"""LlamaIndex's interfaces over trimmed folders: an embedding model and a language model."""

from collections.abc import Sequence
from typing import Any

from trimserve.arguments import AnyPath
from trimserve.encoder.encoder import Encoder
from trimserve.errors import MissingExtraError
from trimserve.generation.generator import Generator
from trimserve.integrations.messages import message, open_encoder, open_generator

try:
    from llama_index.core.base.llms.types import (
        ChatMessage,
        ChatResponse,
        ChatResponseGen,
        CompletionResponse,
        CompletionResponseGen,
        LLMMetadata,
        MessageRole,
    )
    from llama_index.core.embeddings import BaseEmbedding
    from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
    from llama_index.core.llms.custom import CustomLLM
    from pydantic import PrivateAttr
except ModuleNotFoundError as error:
    raise MissingExtraError(
        f"trimserve.integrations.llama_index needs {error.name}, which is not installed. Install it with: "
        "pip install 'trimserve[llama-index]'"
    ) from error

_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}


class TrimserveEmbedding(BaseEmbedding):
    """Embeddings of a trimmed folder, with its prompts for queries and for documents where it has them.

    Example:
        >>> embedding = TrimserveEmbedding("minilm-tickets")  # doctest: +SKIP
        >>> len(embedding.get_query_embedding("where is my refund?"))  # doctest: +SKIP
        384
    """

    _model: Encoder = PrivateAttr()

    def __init__(self, folder: AnyPath, *, embed_batch_size: int = 32, **options: Any) -> None:
        super().__init__(model_name=str(folder), embed_batch_size=embed_batch_size)
        self._model = open_encoder(folder, options)

    def _get_query_embedding(self, query: str) -> list[float]:
        found: list[float] = self._model.encode_query(query)[0].tolist()
        return found

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        found: list[list[float]] = self._model.encode_document(texts).tolist()
        return found


class TrimserveLLM(CustomLLM):
    """A trimmed folder as LlamaIndex's language model, in exact mode where it can.

    Options of a call are those of `trimserve.GenerationOptions`.

    Example:
        >>> llm = TrimserveLLM("smollm2-tickets")  # doctest: +SKIP
        >>> llm.complete("Dear customer,", max_new_tokens=16).text  # doctest: +SKIP
    """

    _model: Generator = PrivateAttr()

    def __init__(self, folder: AnyPath, **options: Any) -> None:
        super().__init__()
        self._model = open_generator(folder, options)

    @property
    def metadata(self) -> LLMMetadata:
        """Its name and limits."""
        context = self._model.config.context
        limit = {} if context is None else {"context_window": context}
        return LLMMetadata(model_name=str(self._model.folder.path), is_chat_model=True, **limit)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **options: Any) -> CompletionResponse:  # noqa: ARG002
        """Go on from a text."""
        (made,) = self._model.generate(prompt, **options)
        return CompletionResponse(text=made.text)

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **options: Any) -> CompletionResponseGen:  # noqa: ARG002
        """Go on from a text, piece by piece."""

        def pieces() -> CompletionResponseGen:
            text = ""
            for piece in self._model.stream(prompt, **options):
                text += piece
                yield CompletionResponse(text=text, delta=piece)

        return pieces()

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **options: Any) -> ChatResponse:
        """Answer a conversation, through the folder's own chat template."""
        made = self._model.chat(_rendered(messages), **options)
        return ChatResponse(message=ChatMessage(role=MessageRole.ASSISTANT, content=made.text))

    @llm_chat_callback()
    def stream_chat(self, messages: Sequence[ChatMessage], **options: Any) -> ChatResponseGen:
        """Answer a conversation, piece by piece."""

        def pieces() -> ChatResponseGen:
            text = ""
            for piece in self._model.stream_chat(_rendered(messages), **options):
                text += piece
                answer = ChatMessage(role=MessageRole.ASSISTANT, content=text)
                yield ChatResponse(message=answer, delta=piece)

        return pieces()

    @classmethod
    def class_name(cls) -> str:
        """Its name in LlamaIndex's own files."""
        return "trimserve"


def _rendered(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    return [message(each.role.value, each.content, _ROLES) for each in messages]
