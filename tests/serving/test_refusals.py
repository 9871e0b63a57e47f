"""What a server refuses: by name, in OpenAI's shape, with the status that clients act on."""

import json
import urllib.error
import urllib.request

import pytest

pytest.importorskip("openai")
pytest.importorskip("torch")
pytest.importorskip("uvicorn")

import openai

from tests.support.serving import served
from trimserve.serving.fields import NOT_HONOURED, ChatRequest

pytestmark = pytest.mark.export
MESSAGES = [{"role": "user", "content": "the cat"}]


def ask(url, path, body, headers=None):
    """Status, error and headers of an answer."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url + path, raw, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"], error.headers


@pytest.mark.parametrize("name", sorted(NOT_HONOURED[ChatRequest]))
def test_a_field_that_is_not_honoured_is_named(server, name):
    body = {"model": "chat", "messages": MESSAGES, "max_tokens": 1, name: "something"}
    status, error, _ = ask(server.url, "/v1/chat/completions", body)
    assert (status, error["param"], error["code"]) == (400, name, "unsupported_field")
    for off in (None, *NOT_HONOURED[ChatRequest][name]):
        assert ask(server.url, "/v1/chat/completions", body | {name: off})[0] == 200


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/chat/completions", {"messages": MESSAGES, "temprature": 1}, "temprature"),
        ("/v1/chat/completions", {"messages": MESSAGES, "temperature": "hot"}, "temperature"),
        ("/v1/chat/completions", {"messages": MESSAGES, "temperature": 9}, "temperature"),
        ("/v1/chat/completions", {"messages": []}, "messages"),
        ("/v1/chat/completions", {}, "messages"),
        ("/v1/chat/completions", {"messages": [{"content": "x"}]}, "messages"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages",
        ),
        ("/v1/chat/completions", {"messages": MESSAGES, "top_logprobs": 2}, "top_logprobs"),
        ("/v1/chat/completions", {"messages": MESSAGES, "logit_bias": {"x": 1}}, "logit_bias"),
        ("/v1/chat/completions", {"messages": MESSAGES, "logit_bias": {"99999": 1}}, "logit_bias"),
        (
            "/v1/chat/completions",
            {"messages": MESSAGES, "max_tokens": 1, "max_completion_tokens": 2},
            "max_tokens",
        ),
        (
            "/v1/chat/completions",
            {"messages": MESSAGES, "stream_options": {"include_usage": True}},
            "stream_options",
        ),
        ("/v1/chat/completions", {"messages": MESSAGES, "n": 0}, "n"),
        ("/v1/completions", {"prompt": [99999]}, "prompt"),
        ("/v1/completions", {"prompt": [1, "a"]}, "prompt"),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}, "suffix"),
        ("/v1/embeddings", {"input": "a"}, "model"),
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/detokenize", {"tokens": [99999]}, "tokens"),
    ],
)
def test_a_wrong_field_is_named(server, path, fields, param):
    status, error, _ = ask(server.url, path, {"model": "chat"} | fields)
    assert (status, error["param"]) == (400, param)
    assert error["type"] == "invalid_request_error"


def test_embedding_refusals(server):
    for fields, param in (
        ({"input": "a", "dimensions": 10_000}, "dimensions"),
        ({"input": "a", "prompt_name": "nobody"}, "prompt_name"),
        ({"input": [1, 2], "prompt_name": "query"}, "prompt_name"),
        ({"input": [[1] * 1000]}, "input"),
        ({"input": ["a"] * 3000}, "input"),
    ):
        status, error, _ = ask(server.url, "/v1/embeddings", {"model": "embed"} | fields)
        assert (status, error["param"]) == (400, param)


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"a": 1, "a": 2}', b"\xff", b"[" * 10_000])
def test_what_is_no_object_of_json(server, body):
    status, error, _ = ask(server.url, "/v1/chat/completions", body)
    assert (status, error["code"]) == (400, "invalid_json")


def test_a_long_prompt_is_refused(server):
    body = {"model": "chat", "prompt": "a dog runs " * 3000, "max_tokens": 1}
    status, error, _ = ask(server.url, "/v1/completions", body)
    assert status == 400
    assert "2,048" in error["message"]


def test_a_long_body_is_refused(server):
    status, error, _ = ask(server.url, "/v1/completions", b" " * 200_000)
    assert (status, error["code"]) == (413, "request_too_large")


def test_unknown_models_and_routes(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="nobody", messages=MESSAGES)
    assert caught.value.code == "model_not_found"
    status, error, _ = ask(server.url, "/v1/nowhere", {})
    assert (status, error["type"]) == (404, "not_found_error")
    assert server.get("/v1/chat/completions")[0] == 405


def test_keys(folders, tmp_path):
    (tmp_path / "keys").write_text("# of the team\nfirst\n\nsecond\n")
    with served(
        [str(folders["embed"]), "--name", f"e={folders['embed']}", "--api-key-file", str(tmp_path / "keys")]
    ) as server:
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nowhere"):
            assert server.get(path)[0] == 401
            assert server.get(path, {"authorization": "Bearer wrong"})[0] == 401
            assert server.get(path, {"authorization": "first"})[0] == 401
        assert server.get("/health")[0] == 200
        for key in ("first", "second"):
            assert server.get("/v1/models", {"authorization": f"Bearer {key}"})[0] == 200
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
            assert len(client.embeddings.create(model="e", input="cat").data[0].embedding) > 0
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="third", max_retries=0).models.list()
