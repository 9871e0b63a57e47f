"""Trimming a checkpoint by streaming, against `cp` of the bytes it writes; and the memory it takes.

The checkpoint has the shape of Qwen3-0.6B in fp32 (1024 wide, 28 layers, 151,936 rows, 2.4 GB) and random
numbers. Targets: peak memory at most 300 MB above a process that has only imported torch and
transformers, and at most 1.5 times the time of `cp`.
"""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench import harness
from bench.random_tensors import RandomTensor, random_block
from trimserve.console import human_bytes, table
from trimserve.files.tensors import TensorSource, exhaust, write_tensors
from trimserve.vocab.map import Reason, VocabMap

MEMORY_TARGET = 300e6
TIME_TARGET = 1.5
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "tie_word_embeddings": True,
}


def make_checkpoint(folder: Path) -> None:
    """Write a random checkpoint with the tensors that the model class has."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from trimserve_export.checkpoint.axes import build_on_meta

    (folder / "config.json").write_text(json.dumps(CONFIG), "utf-8")
    (folder / "tokenizer.json").write_text("{}", "utf-8")
    model = build_on_meta(AutoConfig.from_pretrained(folder), AutoModelForCausalLM)
    block = random_block()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    tensors: dict[str, TensorSource] = {name: RandomTensor(shape, block) for name, shape in shapes.items()}
    exhaust(write_tensors(folder / "model.safetensors", tensors, {"format": "pt"}))


def worker(mode: str, folder: Path, kept: int) -> dict[str, Any]:
    """One measurement in this process: ``import``, ``trim`` or ``cp``."""
    if mode == "cp":
        return {"seconds": _copy(folder)}
    import transformers  # noqa: F401 - the memory that any user of the checkpoint pays
    from transformers import PreTrainedModel  # noqa: F401

    from trimserve_export.checkpoint import stored as stored_vocab
    from trimserve_export.checkpoint import trim as checkpoint

    if mode == "import":
        return {"peak": harness.memory().peak}
    from trimserve.model.resolve import resolve_model

    source, vocab, out = resolve_model(folder / "source"), _vocab(kept), _empty(folder / "out")
    begin = time.perf_counter()
    stored = stored_vocab.stored_vocab(source)
    found = time.perf_counter()
    written = exhaust(checkpoint.stream_tensors(source, vocab, out, stored, out / "cold_rows.safetensors"))
    seconds = time.perf_counter() - found
    return {"seconds": seconds, "find": found - begin, "bytes": written, "peak": harness.memory().peak}


def _vocab(kept: int) -> VocabMap:
    # Kept ids lie all over the vocab, as a profile's do.
    size = int(CONFIG["vocab_size"])  # type: ignore[call-overload]
    ids = np.sort(np.random.default_rng(1).choice(size, kept, replace=False)).astype(np.int32)
    return VocabMap(ids, np.full(kept, Reason.PROFILE, np.uint8), size)


def _copy(folder: Path) -> float:
    files = [str(path) for path in (folder / "out").iterdir()]
    target = _empty(folder / "copy")
    never = ["--reflink=never"] if sys.platform == "linux" else []
    begin = time.perf_counter()
    subprocess.run(["cp", *never, *files, str(target)], check=True)
    return time.perf_counter() - begin


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def measure(folder: Path, args: Any) -> dict[str, Any]:  # noqa: ANN401
    """Run the variants in turn and reduce them to one row."""
    variants = {
        mode: ["-m", "bench.stream", "--worker", mode, "--folder", str(folder), "--kept", str(args.kept)]
        for mode in ("import", "trim", "cp")
    }
    harness.in_turn({"trim": variants["trim"]}, 1)  # fills the page cache and makes what cp copies
    runs = harness.in_turn(variants, 2 if args.quick else args.rounds)
    seconds = {mode: [run["seconds"] for run in runs[mode]] for mode in ("trim", "cp")}
    peaks = {mode: [run["peak"] for run in runs[mode]] for mode in ("import", "trim")}
    return {
        "bytes": runs["trim"][0]["bytes"],
        "kept": args.kept,
        "samples_s": seconds,
        "seconds": {mode: asdict(harness.spread(values)) for mode, values in seconds.items()},
        "ratio": asdict(harness.ratio(seconds["trim"], seconds["cp"])),
        "find_s": harness.spread([run["find"] for run in runs["trim"]]).median,
        "peak_bytes": {mode: max(values) for mode, values in peaks.items()},
        "extra_bytes": max(peaks["trim"]) - min(peaks["import"]),
    }


def main() -> int:
    """Measure, save the row, print the table."""
    parser = harness.parser(__doc__ or "", rounds=7)
    parser.add_argument("--kept", type=int, default=16_384, help="K (default 16,384)")
    parser.add_argument(
        "--folder", type=Path, help="where to make the 2.4 GB checkpoint (default: temporary)"
    )
    parser.add_argument("--worker", choices=("import", "trim", "cp"), help="one measurement in this process")
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args.worker, args.folder, args.kept)))
        return 0
    with harness.scratch_folder("stream", args.folder) as folder:
        (folder / "source").mkdir()
        make_checkpoint(folder / "source")
        row = measure(folder, args)
    harness.save_row("stream", row, quick=args.quick)
    harness.report(_table(row), {key: value for key, value in row.items() if key != "samples_s"})
    return 0


def _table(row: dict[str, Any]) -> str:
    trim, copy = row["seconds"]["trim"], row["seconds"]["cp"]
    times = [
        (name, f"{value['median']:.2f}", f"{value['p5']:.2f}", f"{value['p95']:.2f}")
        for name, value in (("trim", trim), ("cp", copy))
    ]
    ratio = row["ratio"]
    return "\n".join(
        [
            table((f"{human_bytes(row['bytes'])} written", "median s", "p5", "p95"), times),
            f"ratio {ratio['value']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f}), target {TIME_TARGET}",
            f"peak memory {human_bytes(row['extra_bytes'])} above the imports "
            f"({human_bytes(row['peak_bytes']['import'])}), target {human_bytes(MEMORY_TARGET)}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
