"""One model in one number format, and the ways to generate with it that `bench.decode.run` compares."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import harness

REAL_MODEL = "multidomain-qwen2"


@dataclass(frozen=True, slots=True)
class Way:
    """A way to generate: the folder, the mode asked for, and whether checks may use the sketch."""

    folder: str
    mode: str | None = None
    certify: bool = False

    def ask(self, workers: Mapping[str, harness.Worker], request: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request in this mode to the worker of this folder."""
        asked = {**request, "mode": self.mode}
        if self.mode == "exact":  # only its drafts are checked
            asked["certify"] = self.certify
        return workers[self.folder].ask(json.dumps(asked))


WAYS = {
    "full": Way("full"),
    "compact": Way("trimmed", "compact"),
    "exact": Way("trimmed", "exact"),
    "certified": Way("trimmed", "exact", certify=True),
}


@dataclass(frozen=True, slots=True)
class Case:
    """One model in one number format, exported."""

    name: str
    quantize: str | None
    folders: Mapping[str, Path]
    prompts: Sequence[str]
    tokens: int
    stand: float
    threads: int
    device: str

    def start(self, folder: str) -> harness.Worker:
        """A worker with the full or the trimmed folder."""
        path = str(self.folders[folder].resolve())
        words = [path, "--threads", str(self.threads), "--device", self.device]
        return harness.Worker(["-m", "bench.decode.worker", *words])

    def request(self, number: int) -> dict[str, Any]:
        """The request for the prompt of a step."""
        return {"prompt": self.prompts[number % len(self.prompts)], "tokens": self.tokens}


def make_case(
    args: Any,  # noqa: ANN401
    name: str,
    quantize: str | None,
    work: Path,
    *,
    float32: bool = False,
) -> Case:
    """Export a model in a process of its own; `float32` is for the trained model's stored rows."""
    stand = args.coverage if name == REAL_MODEL else args.stand
    words = ["-m", "bench.decode.models", name, "--work", str(work), "--stand", str(stand)]
    words += ["--prompt-tokens", str(args.prompt_tokens)]
    words += ["--quantize", quantize] if quantize else []
    words += ["--layers", str(args.layers)] if args.layers else []
    words += ["--float32"] if float32 else []
    made = harness.fresh_process(words)
    folders = {folder: Path(made[folder]) for folder in ("full", "trimmed")}
    return Case(name, quantize, folders, made["prompts"], args.tokens, stand, args.threads, args.device)
