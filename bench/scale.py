"""How cost grows: the head's product with rows, width and batch; translating ids with V; profiling with text.

The product of n hidden states with N x H weights is fitted by

    seconds = a + b * N * H + c * n * N * H

where b is the time to bring one weight from memory, and c that of one multiply-add. For n = 1 the first
dominates: reading the head is what a token costs. N stands for V (the full head), K (the compact one) and
V - K (the check of exact mode).

The law then says what public models would gain on this machine if they were run like this. That part is a
simulation, from their published shapes alone: no such model was run.
"""

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from bench import harness
from trimserve.console import table
from trimserve.profiles.profiling import profile
from trimserve.runtime.session import open_session
from trimserve.vocab.map import Reason, VocabMap

ROWS = (16_384, 32_768, 65_536, 131_072, 262_144, 524_288)
WIDTHS = (256, 640, 1024, 2048)
STATES = (1, 4, 16, 32)
_MOST_WEIGHTS = 3 << 28  # 3.2 GB of float32, in a file that the session maps and a packed copy at most
_VOCABS = (32_768, 65_536, 131_072, 262_144, 524_288)
_CORPUS_MB = (0.25, 0.5, 1, 2, 4)
_KEPT = 16_384
_BLOCK = 16


@dataclass(frozen=True, slots=True)
class Shape:
    """A public model's shape, from its config and model card.

    Attributes:
        vocab_size: V.
        width: H.
        active: parameters that take part in one token, the vocab matrices included.
        total: all parameters.
        tied: the head is the embedding.
    """

    vocab_size: int
    width: int
    active: float
    total: float
    tied: bool = False

    @property
    def body(self) -> float:
        """Active parameters without the vocab matrices."""
        return self.active - self.vocab_size * self.width * (1 if self.tied else 2)


SHAPES = {
    "gemma-3-270m": Shape(262_144, 640, 0.268e9, 0.268e9, tied=True),
    "qwen3-0.6b": Shape(151_936, 1024, 0.596e9, 0.596e9, tied=True),
    "gemma-3-1b": Shape(262_144, 1152, 1.0e9, 1.0e9, tied=True),
    "llama-3.2-1b": Shape(128_256, 2048, 1.236e9, 1.236e9, tied=True),
    "llama-3.1-8b": Shape(128_256, 4096, 8.03e9, 8.03e9),
    "8b body, a vocab of 1M": Shape(
        1_048_576, 4096, 6.98e9 + 2 * 1_048_576 * 4096, 6.98e9 + 2 * 1_048_576 * 4096
    ),
    "gemma-3-27b": Shape(262_208, 5376, 27.0e9, 27.0e9, tied=True),
    "llama-3.3-70b": Shape(128_256, 8192, 70.55e9, 70.55e9),
    "qwen3-235b-a22b": Shape(151_936, 4096, 22e9, 235e9),
    "deepseek-v3 (671b, 37b active)": Shape(129_280, 7168, 37e9, 671e9),
    "kimi-k2 (1t, 32b active)": Shape(163_840, 7168, 32e9, 1.04e12),
}


@dataclass(frozen=True, slots=True)
class Law:
    """seconds = a + b * N * H + c * n * N * H; `error` is the median relative residual."""

    a: float
    b: float
    c: float
    error: float

    def seconds(self, weights: float, states: float = 1) -> float:
        """Time of a product of `states` hidden states with so many weights."""
        return self.a + self.b * weights + self.c * states * weights


def fit(points: Sequence[Mapping[str, Any]]) -> Law:
    """Least squares of relative residuals, no coefficient below zero.

    Source: Lawson and Hanson, Solving Least Squares Problems (1974), chapter 23; with three coefficients
    it is enough to try every set of those that are not zero.
    """
    weights = np.array([point["rows"] * point["width"] for point in points], np.float64)
    states = np.array([point["states"] for point in points], np.float64)
    seconds = np.array([point["ms"] for point in points]) / 1e3
    columns = np.stack([np.ones_like(weights), weights, states * weights], axis=1) / seconds[:, None]
    best, least = np.zeros(3), np.inf
    for chosen in ([0, 1, 2], [1, 2], [0, 2], [0, 1], [1], [2]):
        found = np.zeros(3)
        found[chosen] = np.linalg.lstsq(columns[:, chosen], np.ones(len(seconds)), rcond=None)[0]
        residual = float(((columns @ found - 1) ** 2).sum())
        if (found >= 0).all() and residual < least:
            best, least = found, residual
    error = float(np.median(np.abs(columns @ best - 1)))
    return Law(float(best[0]), float(best[1]), float(best[2]), error)


def make_heads(folder: Path, rows: int, width: int) -> Path:
    """Write two graphs over the same random rows, as the exporter writes them.

    Returns:
        The folder: ``head.onnx`` is a tied head, for one hidden state; ``check.onnx`` is the product of the
        check, whose left operand are the rows, for several.
    """
    block = np.random.default_rng(0).standard_normal((4096, width), np.float32).tobytes()
    with (folder / "rows.bin").open("wb") as file:
        for _ in range(rows // 4096):
            file.write(block)
    node = onnx.helper.make_node
    head = node("FusedMatMul", ["hidden_states", "rows"], ["logits"], domain="com.microsoft", transB=1)
    check = [
        node("Transpose", ["hidden_states"], ["columns"], perm=[1, 0]),
        node("MatMul", ["rows", "columns"], ["logits"]),
    ]
    _write_graph(folder / "head.onnx", [head], (rows, width), ["states", rows])
    _write_graph(folder / "check.onnx", check, (rows, width), [rows, "states"])
    return folder


def _write_graph(
    path: Path, nodes: list[onnx.NodeProto], shape: tuple[int, int], logits: list[str | int]
) -> None:
    weights = onnx.TensorProto(
        name="rows",
        data_type=onnx.TensorProto.FLOAT,
        dims=shape,
        data_location=onnx.TensorProto.EXTERNAL,
    )
    weights.external_data.add(key="location", value="rows.bin")
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "head",
        [value("hidden_states", onnx.TensorProto.FLOAT, ["states", shape[1]])],
        [value("logits", onnx.TensorProto.FLOAT, logits)],
        [weights],
    )
    opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("com.microsoft", 1)]
    path.write_bytes(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def time_heads(
    folder: Path, states: Sequence[int], threads: int, device: str, seconds: float
) -> dict[int, float]:
    """Milliseconds of a product with each number of hidden states, in this process."""
    names = ("head.onnx", "check.onnx")
    sessions = [open_session(folder / name, threads=threads, device=device, prepack=False) for name in names]
    width = sessions[0].get_inputs()[0].shape[1]
    found = {}
    for count in states:
        feeds = {"hidden_states": np.random.default_rng(1).standard_normal((count, width), np.float32)}
        samples: list[float] = []
        end = time.perf_counter() + seconds
        while len(samples) < 7 or (time.perf_counter() < end and len(samples) < 2 + harness.MIN_STEPS):
            begin = time.perf_counter_ns()
            sessions[count > 1].run(None, feeds)
            samples.append((time.perf_counter_ns() - begin) / 1e6)
        found[count] = float(np.median(samples[2:]))
    return found


def heads(args: Any, scratch: Path) -> list[dict[str, Any]]:  # noqa: ANN401
    """Measure every size that is asked for and fits, each in a process of its own."""
    points = []
    for width in args.widths:
        for rows in args.rows:
            if rows * width > _MOST_WEIGHTS:
                continue
            folder = make_heads(scratch, rows, width)
            words = ["-m", "bench.scale", "--worker", str(folder), "--threads", str(args.threads)]
            words += ["--device", args.device, "--seconds", str(args.seconds)]
            times = harness.fresh_process(words)
            points += [
                {"rows": rows, "width": width, "states": int(states), "ms": ms}
                for states, ms in times.items()
            ]
            print(f"{rows:,} x {width}: {times['1']:.2f} ms", file=sys.stderr)
    return points


def translation(vocabs: Sequence[int]) -> list[dict[str, float]]:
    """Nanoseconds a token to translate ids, by V."""
    random = np.random.default_rng(3)
    found = []
    for vocab_size in vocabs:
        kept = np.sort(random.choice(vocab_size, _KEPT // 2, replace=False)).astype(np.int32)
        vocab = VocabMap(kept, np.full(kept.size, Reason.PROFILE, np.uint8), vocab_size)
        ids = random.choice(kept, (32, 128)).astype(np.int32)
        ids[:, ::50] = random.integers(0, vocab_size, ids[:, ::50].shape)
        samples = []
        for _ in range(harness.MIN_STEPS):
            begin = time.perf_counter_ns()
            vocab.with_slots(ids)
            samples.append((time.perf_counter_ns() - begin) / ids.size)
        found.append({"vocab_size": vocab_size, "ns_a_token": float(np.median(samples))})
    return found


def profiling(sizes: Sequence[float], scratch: Path) -> list[dict[str, float]]:
    """Seconds to profile a corpus, by its size."""
    data = harness.data_folder()
    text = (data / "corpora" / "medquad-en" / "text.txt").read_text("utf-8")
    found = []
    for megabytes in sizes:
        corpus = scratch / "corpus.txt"
        corpus.write_text(text[: int(megabytes * 1e6)], "utf-8")
        begin = time.perf_counter()
        counted = profile([corpus], data / "models" / "multidomain-qwen2", progress=False)
        seconds = time.perf_counter() - begin
        found.append({"megabytes": megabytes, "seconds": seconds, "tokens": counted.tokens})
    return found


def simulate(law: Law, shape: Shape, kept: int = _KEPT) -> dict[str, float]:
    """What a model would gain at K kept ids by the law, one token at a time: no such model was run."""
    head, compact = shape.vocab_size * shape.width, min(kept, shape.vocab_size) * shape.width
    body = law.seconds(shape.body) - law.a
    full = body + law.seconds(head)
    short = body + law.seconds(compact)
    exact = short + law.seconds(head - compact, _BLOCK) / _BLOCK
    matrices = 1 if shape.tied else 2
    return {
        "vocab_share": matrices * head / shape.total,
        "parameters_removed": matrices * (head - compact),
        "compact": full / short,
        "exact": full / exact,
        "exact_by_bandwidth": (shape.body + head) / (shape.body + compact + (head - compact) / _BLOCK),
    }


HEADER = (
    "model (simulated)",
    "V",
    "H",
    "vocab's share",
    "removed",
    "compact",
    "exact",
    "exact, by bytes alone",
)


def lines(simulated: Mapping[str, Mapping[str, float]]) -> list[tuple[str, ...]]:
    """The simulation for people, under `HEADER`."""
    return [
        (
            name,
            f"{SHAPES[name].vocab_size:,}",
            f"{SHAPES[name].width:,}",
            f"{one['vocab_share']:.1%}",
            f"{one['parameters_removed'] / 1e9:.2f} B",
            *(f"{one[key]:.2f} x" for key in ("compact", "exact", "exact_by_bandwidth")),
        )
        for name, one in simulated.items()
    ]


def main() -> int:
    """Measure, fit, simulate; save the row and print the tables."""
    parser = harness.parser(__doc__ or "", rounds=1, work="graphs of up to 3.2 GB")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS), help="multiples of 4,096")
    parser.add_argument("--widths", nargs="+", type=int, default=list(WIDTHS))
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="a size and batch, after five steps (default 1)"
    )
    parser.add_argument("--worker", type=Path, help="time the graphs here in this process (used by itself)")
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(time_heads(args.worker, STATES, args.threads, args.device, args.seconds)))
        return 0
    vocabs: Sequence[int] = _VOCABS
    sizes: Sequence[float] = _CORPUS_MB
    if args.quick:
        args.rows, args.widths, args.seconds = [16_384, 32_768], [256, 512], 0.05
        vocabs, sizes = vocabs[:2], (0.05, 0.1)
    with harness.scratch_folder("scale", args.work) as scratch:
        neighbours = harness.Neighbours()
        points = heads(args, scratch)
        profiled = profiling(sizes, scratch) if harness.data_folder().is_dir() else []
    law = fit(points)
    bandwidth = harness.bandwidth(args.threads)
    row: dict[str, Any] = {
        "threads": args.threads,
        "points": points,
        "law": asdict(law),
        "weights_bytes_per_s": 4 / law.b if law.b else None,
        "copy_bytes_per_s": bandwidth,
        "translation": translation(vocabs),
        "profiling": profiled,
        "simulated": {name: simulate(law, shape) for name, shape in SHAPES.items()},
        "shapes": {name: asdict(shape) for name, shape in SHAPES.items()},
        "others_cpu_share": neighbours.share(),
    }
    harness.save_row("scale", row, quick=args.quick, device=args.device)
    print(
        f"ms = {1e3 * law.a:.3f} + ({1e9 * law.b:.3f} + {1e9 * law.c:.4f} n) N H / 1e6, "
        f"median error {law.error:.0%}; a copy of large arrays moves {bandwidth / 1e9:.1f} GB/s",
        file=sys.stderr,
    )
    harness.report(table(HEADER, lines(row["simulated"])), {"law": row["law"], "simulated": row["simulated"]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
