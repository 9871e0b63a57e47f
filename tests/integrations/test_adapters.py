"""LangChain's and LlamaIndex's interfaces, by the libraries themselves, against the model alone."""

import asyncio
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("torch")

from trimserve.errors import UsageError
from trimserve.loading import load

pytestmark = pytest.mark.export
OPTIONS = {"max_new_tokens": 6, "temperature": 0}
TEXTS = ["the cat", "a dog sat on the mat"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A chat and an encoder."""
    from tests.support.served_models import KINDS

    place = tmp_path_factory.mktemp("adapters")
    return {name: KINDS[name].export(place / name) for name in ("chat", "sentence")}


@pytest.fixture(scope="module")
def encoder(folders):
    return load(folders["sentence"], threads=1)


@pytest.fixture(scope="module")
def generator(folders):
    return load(folders["chat"], threads=1)


def test_langchain_embeddings(folders, encoder):
    pytest.importorskip("langchain_core")
    from langchain_core.vectorstores import InMemoryVectorStore

    from trimserve.integrations.langchain import TrimserveEmbeddings

    embeddings = TrimserveEmbeddings(folders["sentence"], threads=1)
    np.testing.assert_array_equal(
        np.float32(embeddings.embed_documents(TEXTS)), encoder.encode_document(TEXTS)
    )
    np.testing.assert_array_equal(np.float32(embeddings.embed_query("cat")), encoder.encode_query("cat")[0])
    store = InMemoryVectorStore.from_texts(TEXTS, embeddings)
    (found,) = store.similarity_search(TEXTS[1], k=1)
    expected = encoder.similarity(encoder.encode_query(TEXTS[1]), encoder.encode_document(TEXTS))[0]
    assert found.page_content == TEXTS[int(expected.argmax())]
    with pytest.raises(UsageError, match="need an encoder"):
        TrimserveEmbeddings(folders["chat"])


def test_langchain_chat(folders, generator):
    pytest.importorskip("langchain_core")
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage

    from trimserve.integrations.langchain import ChatTrimserve

    chat = ChatTrimserve(folders["chat"], threads=1)
    history = [SystemMessage("sat"), HumanMessage("the cat"), AIMessage("la"), HumanMessage("the dog")]
    roles = ("system", "user", "assistant", "user")
    messages = [{"role": role, "content": each.content} for role, each in zip(roles, history, strict=True)]
    expected = generator.chat(messages, **OPTIONS)
    answer = chat.invoke(history, **OPTIONS)
    assert answer.content == expected.text != ""
    assert answer.response_metadata["finish_reason"] == ("length" if expected.stopped == "length" else "stop")
    assert "".join(piece.content for piece in chat.stream(history, **OPTIONS)) == expected.text
    assert asyncio.run(chat.ainvoke(history, **OPTIONS)).content == expected.text

    async def streamed():
        return [piece.content async for piece in chat.astream(history, **OPTIONS)]

    assert "".join(asyncio.run(streamed())) == expected.text
    stop = expected.text[2:4]
    assert chat.bind(stop=[stop]).invoke(history, **OPTIONS).content == expected.text.split(stop)[0]
    with pytest.raises(UsageError, match="did you mean max_new_tokens"):
        chat.invoke("a", max_tokens=3)
    with pytest.raises(UsageError, match="has no place in a chat here"):
        chat.invoke([ToolMessage("3", tool_call_id="1")])
    with pytest.raises(UsageError, match="needs a generator"):
        ChatTrimserve(folders["sentence"])


def test_llama_index_embedding(folders, encoder):
    pytest.importorskip("llama_index.core")
    from trimserve.integrations.llama_index import TrimserveEmbedding

    embedding = TrimserveEmbedding(folders["sentence"], threads=1)
    np.testing.assert_array_equal(
        np.float32(embedding.get_text_embedding_batch(TEXTS)), encoder.encode_document(TEXTS)
    )
    np.testing.assert_array_equal(
        np.float32(embedding.get_query_embedding("cat")), encoder.encode_query("cat")[0]
    )


def test_llama_index_llm(folders, generator):
    pytest.importorskip("llama_index.core")
    from llama_index.core.llms import ChatMessage

    from trimserve.integrations.llama_index import TrimserveLLM

    llm = TrimserveLLM(folders["chat"], threads=1)
    expected = generator.generate("the cat", **OPTIONS)[0].text
    assert llm.complete("the cat", **OPTIONS).text == expected != ""
    assert [*llm.stream_complete("the cat", **OPTIONS)][-1].text == expected
    messages = [{"role": "system", "content": "sat"}, {"role": "user", "content": "the dog"}]
    expected = generator.chat(messages, **OPTIONS).text
    history = [ChatMessage(**message) for message in messages]
    assert llm.chat(history, **OPTIONS).message.content == expected
    pieces = [*llm.stream_chat(history, **OPTIONS)]
    assert "".join(piece.delta for piece in pieces) == pieces[-1].message.content == expected
    assert asyncio.run(llm.acomplete("the cat", **OPTIONS)).text
    assert llm.metadata.is_chat_model


@pytest.mark.parametrize(
    ("module", "library"), [("langchain", "langchain_core"), ("llama_index", "llama_index")]
)
def test_without_the_library_the_pip_command_is_named(module, library):
    code = (
        f"import sys; sys.modules['{library}'] = None\n"
        f"from trimserve.errors import MissingExtraError\n"
        f"try:\n    import trimserve.integrations.{module}\n"
        "except MissingExtraError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"pip install 'trimserve[{module.replace('_', '-')}]'" in done.stdout
