"""The official client against a real server: what it reads, and that it is what the library says alone."""

import base64
import json
import urllib.request

import numpy as np
import pytest

pytest.importorskip("openai")
pytest.importorskip("torch")
pytest.importorskip("uvicorn")

import openai

from trimserve.loading import load

pytestmark = pytest.mark.export
MESSAGES = [{"role": "user", "content": "the cat sat on"}]


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def chat_model(folders):
    return load(folders["chat"], threads=1)


@pytest.fixture(scope="module")
def embedder(folders):
    return load(folders["embed"], threads=1)


def test_chat_is_the_librarys(client, chat_model):
    alone = chat_model.chat(MESSAGES, max_new_tokens=24, temperature=0)
    answer = client.chat.completions.create(
        model="chat",
        messages=MESSAGES,
        max_tokens=24,
        temperature=0,
        extra_body={"return_token_ids": True},
    )
    (choice,) = answer.choices
    assert choice.message.content == alone.text
    assert choice.token_ids == list(alone.ids)
    assert choice.finish_reason == {"eos": "stop", "length": "length"}[alone.stopped]
    assert answer.prompt_token_ids == chat_model.chat_ids(MESSAGES).tolist()
    assert answer.usage.completion_tokens == len(alone.ids)
    assert answer.usage.prompt_tokens == len(answer.prompt_token_ids)


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({"temperature": 1.0, "seed": 5, "top_p": 0.9}, {"temperature": 1.0, "seed": 5, "top_p": 0.9}),
        (
            {"temperature": 0.8, "seed": 6, "extra_body": {"top_k": 9, "min_p": 0.01}},
            {"temperature": 0.8, "seed": 6, "top_k": 9, "min_p": 0.01},
        ),
        (
            {"temperature": 0, "presence_penalty": 1.5, "frequency_penalty": 0.5},
            {"temperature": 0, "presence_penalty": 1.5, "frequency_penalty": 0.5},
        ),
        ({"temperature": 0, "logit_bias": {"40": 50}}, {"temperature": 0, "logit_bias": {40: 50.0}}),
        ({"temperature": 0, "stop": ["t", "é"]}, {"temperature": 0, "stop": ["t", "é"]}),
    ],
)
def test_options_are_the_librarys(client, chat_model, fields, options):
    alone = chat_model.chat(MESSAGES, max_new_tokens=16, **options)
    extra = {"return_token_ids": True, **fields.pop("extra_body", {})}
    answer = client.chat.completions.create(
        model="chat", messages=MESSAGES, max_tokens=16, extra_body=extra, **fields
    )
    assert answer.choices[0].message.content == alone.text
    assert answer.choices[0].token_ids == list(alone.ids)


def test_a_stream_adds_up_to_the_whole(client, chat_model):
    alone = chat_model.chat(MESSAGES, max_new_tokens=40, temperature=1.0, seed=3)
    stream = client.chat.completions.create(
        model="chat",
        messages=MESSAGES,
        max_tokens=40,
        temperature=1.0,
        seed=3,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"return_token_ids": True},
    )
    *chunks, last = list(stream)
    deltas = [chunk.choices[0] for chunk in chunks]
    assert deltas[0].delta.role == "assistant"
    assert "".join(one.delta.content or "" for one in deltas) == alone.text
    assert [id_ for one in deltas for id_ in getattr(one, "token_ids", None) or []] == list(alone.ids)
    assert [one.finish_reason for one in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason is not None
    assert last.choices == []
    assert last.usage.completion_tokens == len(alone.ids)


def test_choices_can_be_had_one_by_one(client):
    def ask(seed, n):
        answer = client.completions.create(
            model="chat", prompt="the cat", max_tokens=8, temperature=1, seed=seed, n=n
        )
        return [choice.text for choice in answer.choices]

    together = ask(11, 3)
    assert together == [*ask(11, 1), *ask(12, 1), *ask(13, 1)]
    assert len(set(together)) > 1


def test_completions_of_texts_and_ids(client, chat_model):
    texts = ["the cat", "a dog runs"]
    alone = chat_model.generate(texts, max_new_tokens=8, temperature=0)
    answer = client.completions.create(model="chat", prompt=texts, max_tokens=8, temperature=0, echo=True)
    assert [choice.text for choice in answer.choices] == [
        text + one.text for text, one in zip(texts, alone, strict=True)
    ]
    ids = [ids.tolist() for ids in chat_model.codec.encode(texts)]
    by_ids = client.completions.create(model="chat", prompt=ids, max_tokens=8, temperature=0)
    assert [choice.text for choice in by_ids.choices] == [one.text for one in alone]


def test_logprobs_are_the_full_models(client, chat_model):
    answer = client.completions.create(
        model="chat",
        prompt="the cat",
        max_tokens=6,
        temperature=0,
        logprobs=2,
        extra_body={"return_token_ids": True},
    )
    (choice,) = answer.choices
    prompt = chat_model.codec.encode(["the cat"])[0]
    whole = np.concatenate([prompt, np.array(choice.token_ids, np.int32)])
    from trimserve.decoding.scoring import Scorer

    scorer = Scorer(
        chat_model._decoder, chat_model.folder.vocab, chat_model._cold, chat_model._cold_head("score")
    )
    expected = scorer.score(whole).log_probs[prompt.size - 1 :]
    found = np.array(choice.logprobs.token_logprobs)
    # Another product with other sums: a few roundings of float32.
    assert np.abs(found - expected).max() < 1e-4
    assert all(len(top) <= 2 for top in choice.logprobs.top_logprobs)
    best = [max(top.values()) for top in choice.logprobs.top_logprobs]
    assert found.tolist() == best  # greedy


def test_embeddings_are_the_librarys(client, embedder):
    texts = ["the cat", "a dog sat on the mat", ""]
    alone = embedder.encode(texts)
    # The client asks for base64 by itself.
    answer = client.embeddings.create(model="embed", input=texts)
    found = np.array([one.embedding for one in answer.data], np.float32)
    assert np.array_equal(found, alone)
    plain = client.embeddings.create(model="embed", input=texts, encoding_format="float", dimensions=4)
    assert np.array_equal(np.array([one.embedding for one in plain.data], np.float32), alone[:, :4])


def test_embeddings_of_ids_and_prompts(client, embedder):
    ids = [ids.tolist() for ids in embedder.token_ids(["the cat", "a dog"])]
    answer = client.embeddings.create(model="embed", input=ids)
    found = np.array([one.embedding for one in answer.data], np.float32)
    assert np.array_equal(found, embedder.encode(["the cat", "a dog"]))
    prompted = client.embeddings.create(model="embed", input="cat", extra_body={"prompt_name": "query"})
    assert np.array_equal(
        np.array(prompted.data[0].embedding, np.float32), embedder.encode("cat", prompt_name="query")[0]
    )


def post(server, path, **fields):
    request = urllib.request.Request(server.url + path, json.dumps(fields).encode())
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


def test_rerank_and_score(server, folders):
    documents = ["the cat", "a dog sat", "the mat"]
    model = load(folders["rank"], threads=1)
    alone = model.rank("cat", documents, top_k=2)
    found = post(server, "/v1/rerank", model="rank", query="cat", documents=documents, top_n=2)
    shown = [(one["index"], np.float32(one["relevance_score"])) for one in found["results"]]
    assert shown == [(one["corpus_id"], np.float32(one["score"])) for one in alone]
    scores = post(server, "/v1/score", model="rank", text_1="cat", text_2=documents)["data"]
    expected = model.predict([("cat", document) for document in documents])
    assert [np.float32(one["score"]) for one in scores] == expected.tolist()


def test_similarity_of_embeddings(server, embedder):
    found = post(server, "/v1/score", model="embed", text_1="cat", text_2=["the cat", "a dog"])["data"]
    expected = embedder.similarity(embedder.encode("cat"), embedder.encode(["the cat", "a dog"]))[0]
    assert np.abs(np.array([one["score"] for one in found]) - expected).max() < 1e-6


def test_tokens_and_back(server, chat_model):
    (ids,) = chat_model.codec.encode(["the cat"])
    found = post(server, "/tokenize", model="chat", prompt="the cat", return_token_strs=True)
    assert found["tokens"] == ids.tolist()
    assert "".join(found["token_strs"]) == "the cat"
    assert post(server, "/detokenize", model="chat", tokens=ids.tolist()) == {"prompt": "the cat"}
    chat = post(server, "/tokenize", model="chat", messages=MESSAGES)
    assert chat["tokens"] == chat_model.chat_ids(MESSAGES).tolist()


def test_models(client, folders):
    cards = {card.id: card for card in client.models.list()}
    assert list(cards) == ["chat", "embed", "rank"]
    assert cards["chat"].max_model_len == 2048
    assert client.models.retrieve("embed").task == "feature-extraction"


def test_base64_is_little_endian_float32(server, embedder):
    found = post(server, "/v1/embeddings", model="embed", input="the cat", encoding_format="base64")
    row = np.frombuffer(base64.b64decode(found["data"][0]["embedding"]), "<f4")
    assert np.array_equal(row, embedder.encode("the cat")[0])
