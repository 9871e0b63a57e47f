"""Trimming a model from its checkpoint and from an ONNX graph: time, memory, bytes, beside onnxsim and `cp`.

The models have the shapes of Gemma-3-270m, Qwen3-0.6B and Llama-3.2-1B, tied, in fp32, and random numbers; K
is 16,384. Each measurement is a process of its own. Private memory is the largest anonymous memory that a
thread saw every two milliseconds, less what the process had after its imports. `cp` copies the bytes that
the way beside it wrote. onnxsim holds a model in one message of at most 2 GiB, so it can do the smallest; it
writes no cold rows and no hashes.
"""

import json
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np

from bench import harness
from bench.trim.models import SHAPES, make_checkpoint, make_graph
from trimserve.console import human_bytes, table
from trimserve.vocab.map import Reason, VocabMap

MEMORY_TARGET = 200e6
# What is measured, and of which its `cp` is a copy.
# onnx.load refuses data that has several hard links: the links come last.
WAYS = ("checkpoint", "onnx", "onnxsim", "link")
_LABELS = {
    "checkpoint": "checkpoint",
    "onnx": "ONNX, complete copy",
    "link": "ONNX, `--link`",
    "onnxsim": "onnxsim 0.8.1",
}
_ONNXSIM_LIMIT = 2 << 30


class AnonymousPeak:
    """The largest anonymous memory of this process while a block runs, above that before it."""

    def __enter__(self) -> Self:
        """Start watching."""
        self._before = self._peak = harness.memory().anonymous or 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop watching."""
        self._ended.set()
        self._thread.join()

    @property
    def bytes(self) -> int:
        """Bytes above those at the start."""
        return self._peak - self._before

    def _watch(self) -> None:
        while not self._ended.wait(0.002):
            self._peak = max(self._peak, harness.memory().anonymous or 0)


def worker(way: str, folder: Path, kept: int) -> dict[str, Any]:
    """One measurement in this process."""
    out = folder / f"out-{way}"
    shutil.rmtree(out, ignore_errors=True)
    if way.startswith("cp-"):
        return {"seconds": _copy(folder / f"out-{way.removeprefix('cp-')}", out)}
    size = json.loads((folder / "onnx" / "config.json").read_text("utf-8"))["vocab_size"]
    run = _onnxsim if way == "onnxsim" else _trimserve
    return run(way, folder, out, _vocab(kept, size))


def _trimserve(way: str, folder: Path, out: Path, vocab: VocabMap) -> dict[str, Any]:
    import onnxruntime  # noqa: F401 - the memory that any use of the export pays
    from transformers import AutoModelForCausalLM, PreTrainedModel  # noqa: F401

    from trimserve_export import pipeline

    # The sketch is a choice of exact mode, not a part of trimming: bench.decode measures it.
    graph = {"link": way == "link", "sketch": "none"}
    options: dict[str, Any] = {"to": "safetensors"} if way == "checkpoint" else graph
    source = folder / ("checkpoint" if way == "checkpoint" else "onnx")
    with AnonymousPeak() as peak:
        begin = time.perf_counter()
        pipeline.export(source, vocab, out, progress=False, **options)
        seconds = time.perf_counter() - begin
    return _measured(seconds, peak, out)


def _onnxsim(_: str, folder: Path, out: Path, vocab: VocabMap) -> dict[str, Any]:
    import onnx
    from onnxsim import pruning

    out.mkdir()
    with AnonymousPeak() as peak:
        begin = time.perf_counter()
        model = onnx.load(folder / "onnx" / "model.onnx")
        result = pruning.apply_embedding_vocab_pruning(model, keep_token_ids=vocab.kept_ids.tolist())
        if not result.matched:
            raise RuntimeError("onnxsim does not match the graph")
        onnx.save(result.model, out / "model.onnx", save_as_external_data=True, location="model.onnx_data")
        seconds = time.perf_counter() - begin
    return _measured(seconds, peak, out)


def _measured(seconds: float, peak: AnonymousPeak, out: Path) -> dict[str, Any]:
    files = [file.stat() for file in out.rglob("*") if file.is_file()]
    return {
        "seconds": seconds,
        "private": peak.bytes,
        "peak": harness.memory().peak,
        "bytes": sum(stat.st_size for stat in files),
        "written": sum(stat.st_size for stat in files if stat.st_nlink == 1),
    }


def _vocab(kept: int, size: int) -> VocabMap:
    # Kept ids lie all over the vocab, as a profile's do.
    ids = np.sort(np.random.default_rng(1).choice(size, kept, replace=False)).astype(np.int32)
    return VocabMap(ids, np.full(kept, Reason.PROFILE, np.uint8), size)


def _copy(source: Path, target: Path) -> float:
    never = ["--reflink=never"] if sys.platform == "linux" else []
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", *never, str(source), str(target)], check=True)
    return time.perf_counter() - begin


def measure(name: str, folder: Path, args: Any) -> dict[str, Any]:  # noqa: ANN401
    """Make a model, run the ways in turn and reduce them to one row."""
    shape = SHAPES[name]
    make_checkpoint(folder / "checkpoint", shape)
    make_graph(folder / "onnx", shape)
    onnx_bytes = sum(file.stat().st_size for file in (folder / "onnx").iterdir())
    ways = [way for way in WAYS if way != "onnxsim" or onnx_bytes < _ONNXSIM_LIMIT]
    order = [step for way in ways for step in ((way,) if way == "link" else (way, f"cp-{way}"))]
    common = ["--folder", str(folder), "--kept", str(args.kept)]
    variants = {step: ["-m", "bench.trim.run", "--worker", step, *common] for step in order}
    rounds = 1 if args.quick else args.rounds
    runs: dict[str, list[dict[str, Any]]] = {step: [] for step in order}
    for number in range(rounds):  # always in this order: a `cp` copies what the way before it wrote
        for step in order:
            runs[step].append(harness.fresh_process(variants[step]))
            print(f"{name} round {number + 1}/{rounds}: {step}", file=sys.stderr)
            if step.startswith("cp-"):  # room for the next
                shutil.rmtree(folder / f"out-{step}")
                shutil.rmtree(folder / f"out-{step.removeprefix('cp-')}")
        shutil.rmtree(folder / "out-link", ignore_errors=True)
    return {
        "model": name,
        "vocab_size": shape.vocab_size,
        "parameters": shape.parameters,
        "source_bytes": onnx_bytes,
        "kept": args.kept,
        "ways": {step: _reduced(results) for step, results in runs.items()},
        "memory_target": MEMORY_TARGET,
    }


def _reduced(results: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = [result["seconds"] for result in results]
    reduced = {"seconds": asdict(harness.spread(seconds)), "seconds_samples": seconds}
    largest = {key: max(result[key] for result in results) for key in results[0] if key != "seconds"}
    return reduced | largest


HEADER = ("fp32, K = 16,384", "source", "way", "s", "`cp`, s", "private memory", "peak memory", "written")


def lines(row: dict[str, Any]) -> list[tuple[str, ...]]:
    """A line of the table for each way."""
    made: list[tuple[str, ...]] = []
    for way in (way for way in WAYS if way in row["ways"]):
        found, copy = row["ways"][way], row["ways"].get(f"cp-{way}")
        made.append(
            (
                row["model"],
                human_bytes(row["source_bytes"]),
                _LABELS[way],
                f"{found['seconds']['median']:.1f}",
                "" if copy is None else f"{copy['seconds']['median']:.1f}",
                human_bytes(found["private"]),
                human_bytes(found["peak"]),
                human_bytes(found["written"]),
            )
        )
    return made


def main() -> int:
    """Measure, save a row a model, print the table."""
    parser = harness.parser(__doc__ or "", rounds=3)
    parser.add_argument("--kept", type=int, default=16_384, help="K (default 16,384)")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["0.27B", "0.6B", "1.2B"])
    parser.add_argument(
        "--folder", type=Path, help="where to make the models, up to 20 GB (default: temporary)"
    )
    parser.add_argument("--worker", help="one measurement in this process")
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args.worker, args.folder, args.kept)))
        return 0
    rows = []
    for name in args.models:
        with harness.scratch_folder("trim", args.folder) as scratch:
            rows.append(measure(name, scratch, args))
        harness.save_row("trim", rows[-1], quick=args.quick)
    text = table(HEADER, [line for row in rows for line in lines(row)])
    harness.report(text, {row["model"]: harness.without_samples(row) for row in rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
