"""A server's life: loading, many clients, clients that go, folders that are replaced, the end."""

import asyncio
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.parse

import pytest

pytest.importorskip("openai")
pytest.importorskip("torch")
pytest.importorskip("uvicorn")

import httpx
import openai

from tests.support.limits import PATIENCE
from tests.support.serving import served
from trimserve.loading import load
from trimserve.serving.app import create_app
from trimserve.serving.settings import make_settings

pytestmark = pytest.mark.export
MESSAGES = [{"role": "user", "content": "the cat"}]


def client_of(server, **options):
    return openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE, **options
    )


def never_ending(folder):
    """A request that is at work until its last token: what would end it before is not allowed."""
    ids = load(folder, threads=1).stop_ids
    return {
        "model": "chat",
        "prompt": "the cat",
        "max_tokens": 1900,
        "temperature": 1,
        "seed": 1,
        "logit_bias": {str(id_): -100 for id_ in ids},
    }


def eventually(holds):
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, "it does not come to that"
        time.sleep(0.05)


def test_many_clients_get_what_each_gets_alone(server, folders):
    model = load(folders["chat"], threads=1)
    prompts = [f"the {word}" for word in ("cat", "dog", "mat", "sun", "sea", "day")]
    options = [{"temperature": 1.0, "seed": seed, "max_new_tokens": 12} for seed in range(len(prompts))]
    alone = [model.generate(prompt, **each)[0].text for prompt, each in zip(prompts, options, strict=True)]
    found: dict[int, str] = {}

    def ask(place):
        answer = client_of(server).completions.create(
            model="chat", prompt=prompts[place], max_tokens=12, temperature=1.0, seed=place
        )
        found[place] = answer.choices[0].text

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert [found[place] for place in range(len(prompts))] == alone


def raw_request(server, body):
    """Send a request and leave the connection open."""
    address = urllib.parse.urlparse(server.url)
    connection = socket.create_connection((address.hostname, address.port))
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n"
    connection.sendall(head.encode() + content)
    return connection


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_is_not_worked_for(server, folders, stream):
    before = server.counts("request_success_total")
    connection = raw_request(server, never_ending(folders["chat"]) | {"stream": stream})
    eventually(lambda: server.counts("num_requests_running") > 0)
    connection.close()
    eventually(lambda: server.counts("num_requests_running") == 0)
    ended = server.get("/metrics")[1]
    assert server.counts("request_success_total") == before + 1
    assert 'finished_reason="cancelled"' in ended


def test_metrics_use_the_known_words(server):
    client_of(server).completions.create(model="chat", prompt="the cat", max_tokens=4, temperature=0)
    text = server.get("/metrics")[1]
    for name in (
        *("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prompt_tokens_total"),
        *("generation_tokens_total", "time_to_first_token_seconds_count", "e2e_request_latency_seconds_sum"),
        *("cold_tokens_total", "accepted_tokens_total", "certified_steps_total", "cold_bytes_read_total"),
        "strict",
    ):
        assert f"trimserve:{name}{{" in text, name
    assert server.counts("generation_tokens_total") > 0


def test_openapi_names_every_route_and_field(server):
    described = json.loads(server.get("/openapi.json")[1])
    chat = described["components"]["schemas"]["ChatRequest"]
    assert {"messages", "temperature", "stream_options"} <= chat["properties"].keys()
    assert chat["additionalProperties"] is False
    assert set(described["paths"]) >= {"/v1/chat/completions", "/v1/embeddings", "/v1/rerank", "/ready"}


def test_a_full_queue_answers_at_once(folders):
    with served([f"--name=chat={folders['chat']}", "--max-queue", "1"]) as server:
        long = never_ending(folders["chat"])
        connections = []
        client = client_of(server)
        with pytest.raises(openai.RateLimitError) as caught:  # noqa: PT012 - one of them is the first
            for _ in range(64):
                connections.append(raw_request(server, long))
                time.sleep(0.05)
                client.completions.create(model="chat", prompt="a", max_tokens=1, n=2)
        assert int(caught.value.response.headers["retry-after"]) >= 1
        assert caught.value.code == "queue_full"
        for connection in connections:
            connection.close()


def test_a_replaced_folder_is_served_without_a_gap(folders, tmp_path):
    path = tmp_path / "model"
    shutil.copytree(folders["chat"], path)
    with served([str(path)]) as server:
        client = client_of(server)

        def ask():
            answer = client.chat.completions.create(
                model="model", messages=MESSAGES, max_tokens=8, temperature=0
            )
            return answer.system_fingerprint, answer.choices[0].message.content

        first = ask()
        shutil.copytree(folders["other"], tmp_path / "new")
        path.rename(tmp_path / "old")
        (tmp_path / "new").rename(path)
        eventually(lambda: ask()[0] != first[0])
        expected = load(folders["other"], threads=1).chat(MESSAGES, max_new_tokens=8, temperature=0)
        assert ask()[1] == expected.text
        # One that does not open changes nothing.
        (path / "trimserve.json").write_text("{}")
        time.sleep(2)
        assert ask()[1] == expected.text
        assert server.get("/ready")[0] == 200


def test_sigterm_lets_what_runs_finish(folders):
    asked = never_ending(folders["chat"]) | {"max_tokens": 1000, "stream": True}
    with served([f"--name=chat={folders['chat']}", "--shutdown-timeout", str(PATIENCE)]) as server:
        stream = client_of(server).completions.create(**asked, extra_body={"return_token_ids": True})
        next(stream)
        server.popen.send_signal(signal.SIGTERM)
        rest = [chunk.choices[0] for chunk in stream]
        assert rest[-1].finish_reason == "length"
        assert sum(len(choice.token_ids or []) for choice in rest[:-1]) >= 900
        assert server.popen.wait(PATIENCE) == 0


def test_the_end_of_the_time_is_said_in_the_stream(folders):
    with served([f"--name=chat={folders['chat']}", "--shutdown-timeout", "0"]) as server:
        stream = client_of(server).completions.create(**never_ending(folders["chat"]), n=8, stream=True)
        next(stream)
        server.popen.send_signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="stopped before"):
            list(stream)
        assert server.popen.wait(PATIENCE) == 0


def test_a_server_that_drains_or_loads_refuses(folders):
    app = create_app(make_settings(folders={"chat": folders["chat"]}))

    async def ask():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            body = {"messages": MESSAGES}
            found = [await client.get("/health"), await client.get("/ready")]
            return [*found, await client.post("/v1/chat/completions", json=body)]

    for code in ("loading", "draining"):
        health, ready, refused = asyncio.run(ask())
        assert (health.status_code, ready.status_code, refused.status_code) == (200, 503, 503)
        assert ready.json() == {"status": code}
        assert refused.json()["error"]["code"] == code
        assert int(refused.headers["retry-after"]) >= 1
        app.models.draining = True


def test_loading_and_folders_that_do_not_open(folders, tmp_path):
    shutil.copytree(folders["chat"], tmp_path / "chat")
    (tmp_path / "chat" / "model.onnx").write_bytes(b"no graph")
    command = [sys.executable, "-m", "trimserve", "serve", str(tmp_path / "chat"), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1
    assert "model.onnx" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_taken_port_is_one_sentence(server, folders):
    port = str(urllib.parse.urlparse(server.url).port)
    command = [sys.executable, "-m", "trimserve", "serve", str(folders["embed"]), "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2
    assert port in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_unix_socket(folders, tmp_path):
    path = tmp_path / "s"
    with served([str(folders["embed"]), "--unix-socket", str(path)], wait=False):
        eventually(path.exists)
        done = subprocess.run(
            ["curl", "-s", "--unix-socket", str(path), "http://x/health"], capture_output=True, text=True
        )
        assert json.loads(done.stdout) == {"status": "ok"}
