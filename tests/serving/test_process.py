"""A server's life: loading, many clients, clients that go, folders that are replaced, the end."""

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

import openai

from tests.support.limits import PATIENCE
from tests.support.serving import served
from trimserve.loading import load

pytestmark = pytest.mark.export
MESSAGES = [{"role": "user", "content": "the cat"}]


def client_of(server, **options):
    return openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE, **options
    )


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
def test_a_client_that_goes_is_not_worked_for(server, stream):
    before = server.counts("request_success_total")
    long = {
        "model": "chat",
        "prompt": "the cat",
        "max_tokens": 1900,
        "temperature": 1,
        "seed": 1,
        "stream": stream,
    }
    connection = raw_request(server, long)
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
        long = {"model": "chat", "prompt": "the cat", "max_tokens": 1900, "temperature": 1, "seed": 1}
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


def test_sigterm_drains(folders):
    with served([f"--name=chat={folders['chat']}"]) as server:
        stream = client_of(server).completions.create(
            model="chat",
            prompt="the cat",
            max_tokens=300,
            temperature=0,
            stream=True,
            logit_bias={str(id_): -100 for id_ in load(folders["chat"], threads=1).stop_ids},
        )
        first = next(stream)
        server.popen.send_signal(signal.SIGTERM)
        eventually(lambda: server.get("/ready")[0] == 503)
        assert server.get("/health")[0] == 200
        with pytest.raises(openai.APIStatusError) as caught:
            client_of(server).completions.create(model="chat", prompt="a", max_tokens=1)
        assert caught.value.status_code == 503
        rest = list(stream)
        assert rest[-1].choices[0].finish_reason == "length"
        assert first.choices[0].text + "".join(chunk.choices[0].text for chunk in rest)
        assert server.popen.wait(PATIENCE) == 0


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
