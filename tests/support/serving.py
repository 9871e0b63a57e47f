"""A real server process, its folders, and who asks it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.limits import PATIENCE

_TEMPLATE = (
    "{% if tools %}tools {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}"
    "{% for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
_SHAPE = {"hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 2048}


def _conversations(root: Path, seed: int) -> Path:
    from tests.support.models import save_model

    source = save_model("llama", root, seed=seed, tokenizer="byte_level_bpe", **_SHAPE)
    path = source / "tokenizer_config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(config | {"chat_template": _TEMPLATE}))
    return source


def make_folders(root: Path) -> dict[str, Path]:
    """Folders to serve: a generator (and another that may replace it), an embedder, a reranker."""
    from tests.support.served_models import KINDS, Kind  # needs torch; the processes that ask do not

    chat = Kind(_conversations, seed=1)
    return {
        "chat": chat.export(root / "chat"),
        "other": chat.export(root / "other", seed=2),
        "embed": KINDS["sentence"].export(root / "embed"),
        "rank": KINDS["pairs"].export(root / "rank"),
    }


@dataclass(frozen=True)
class Process:
    """A running server."""

    popen: subprocess.Popen[str]
    url: str

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> tuple[int, str]:
        """Status and text of an answer."""
        request = urllib.request.Request(self.url + path, headers=dict(headers or {}))
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def wait_ready(self) -> None:
        """Wait until every model is open."""
        end = time.monotonic() + PATIENCE
        while self.get("/ready")[0] != 200:
            assert self.popen.poll() is None, "the server has ended"
            assert time.monotonic() < end, "the server does not become ready"
            time.sleep(0.1)

    def counts(self, name: str) -> float:
        """The sum of a metric over all models."""
        lines = self.get("/metrics")[1].splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"trimserve:{name}{{"))

    def stop(self, signal_: int = signal.SIGTERM) -> int:
        """Ask the process to end; gives its exit code."""
        self.popen.send_signal(signal_)
        return self.popen.wait(PATIENCE)


@contextlib.contextmanager
def served(
    arguments: Sequence[str], environment: Mapping[str, str] | None = None, *, wait: bool = True
) -> Iterator[Process]:
    """Run `trimserve serve` on a free port."""
    command = [sys.executable, "-m", "trimserve", "serve", *arguments, "--port", "0", "--format", "json"]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        **(environment or {}),
    }
    popen = subprocess.Popen([*command, "--threads", "1"], stdout=subprocess.PIPE, text=True, env=env)
    try:
        assert popen.stdout is not None
        line = popen.stdout.readline()
        assert line, "the server has ended before it listened"
        process = Process(popen, json.loads(line)["url"])
        if wait:
            process.wait_ready()
        yield process
    finally:
        popen.kill()
        popen.wait(PATIENCE)
        popen.stdout.close()
