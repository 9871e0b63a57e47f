"""Decoding, full against compact against exact: time, memory, and how much of the ceiling each reaches.

The full model is the untrimmed graph in the same runtime: exported like the trimmed one, with a vocab that
keeps every id. Each variant answers the same prompts greedily, one request at a time, in processes that
take turns; a token's time is that of all tokens but the first, so it holds no prompt. `exact` checks with the
cold product alone, `certified` with the sketch of the cold rows first (docs/certificate.md). Beside the
measured times stand

- the ceiling: bytes of weights a token moves, full to compact (decoding one token at a time is bound by
  them), and the speed at which this machine copies memory;
- the cost model of exact mode, each term measured apart: the decoder's step for each token drafted, the cold
  product for each block checked, and what the rest of the time is.

Random weights make the models (`decode_models` says how drafts come to stand); multidomain-qwen2 is
trained, and answers gsm8k's questions. `--prepare` makes the models in ``--work`` and stops: measuring can
follow when the machine is quiet.
"""

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import harness
from bench.decode_models import SHAPES
from trimserve.report import human_bytes, table
from trimserve.sketch import SKETCH_NAME

SIZES = (1, 2, 4, 8, 16, 32)
REAL_MODEL = "multidomain-qwen2"
_WARM_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Way:
    """A way to generate: the folder, the mode asked for, and whether checks may use the sketch."""

    folder: str
    mode: str | None = None
    certify: bool = False

    def ask(self, workers: Mapping[str, harness.Worker], request: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request in this mode to the worker of this folder."""
        asked = {**request, "mode": self.mode, "certify": self.certify}
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
        return harness.Worker(["-m", "bench.decode_worker", *words])

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
    words = ["-m", "bench.decode_models", name, "--work", str(work), "--stand", str(stand)]
    words += ["--prompt-tokens", str(args.prompt_tokens)]
    words += ["--quantize", quantize] if quantize else []
    words += ["--layers", str(args.layers)] if args.layers else []
    words += ["--float32"] if float32 else []
    made = harness.fresh_process(words)
    folders = {folder: Path(made[folder]) for folder in ("full", "trimmed")}
    return Case(name, quantize, folders, made["prompts"], args.tokens, stand, args.threads, args.device)


def measure(case: Case, steps: int, scratch: Path) -> dict[str, Any]:
    """Measure one case; returns the row for the result file."""
    parts = {name: _parts(folder, scratch / name) for name, folder in case.folders.items()}
    resident = _resident(case)
    neighbours = harness.Neighbours()
    with case.start("full") as full, case.start("trimmed") as trimmed:
        workers = {"full": full, "trimmed": trimmed}
        ways = _ways(case)
        for way in ways.values():  # opens every session, touches every page, and sizes the blocks
            way.ask(workers, case.request(0) | {"tokens": min(case.tokens, _WARM_TOKENS)})
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
        for number in range(steps):
            for name in list(ways)[:: 1 if number % 2 == 0 else -1]:
                answers[name].append(ways[name].ask(workers, case.request(number)))
        context = len(case.prompts[0].split()) + case.tokens // 2
        terms = {
            "full": full.ask(json.dumps(_terms_request(parts["full"], context))),
            "trimmed": trimmed.ask(json.dumps(_terms_request(parts["trimmed"], context))),
        }
    others = {"others_cpu_share": neighbours.share(), "load_average": os.getloadavg()[0]}
    return _row(case, answers, terms, parts, resident) | others


def _ways(case: Case) -> dict[str, Way]:
    """The ways that the case's folders allow."""
    has_sketch = (case.folders["trimmed"] / SKETCH_NAME).exists()
    return {name: way for name, way in WAYS.items() if has_sketch or not way.certify}


def _parts(folder: Path, scratch: Path) -> dict[str, Any]:
    # In a process of its own: onnx_ir keeps files open that are to be deleted.
    return harness.fresh_process(["-m", "bench.decode_parts", str(folder / "model.onnx"), str(scratch)])


def _terms_request(parts: Mapping[str, Any], context: int) -> dict[str, Any]:
    return {"context": context, "sizes": SIZES, "body": parts["body"], "head": parts["head"]}


def _resident(case: Case) -> dict[str, dict[str, int]]:
    """Memory of each variant in a process of its own, after a short answer."""
    found = {}
    for name, way in _ways(case).items():
        with case.start(way.folder) as worker:
            request = case.request(0) | {"tokens": min(case.tokens, _WARM_TOKENS)}
            found[name] = way.ask({way.folder: worker}, request)["memory"]
    return found


def _row(
    case: Case,
    answers: Mapping[str, Sequence[dict[str, Any]]],
    terms: Mapping[str, dict[str, Any]],
    parts: Mapping[str, dict[str, Any]],
    resident: Mapping[str, dict[str, int]],
) -> dict[str, Any]:
    token_ms = {
        name: [answer["ms"] / max(answer["tokens"] - 1, 1) for answer in found]
        for name, found in answers.items()
    }
    pairs = [
        ("compact", "full"),
        *((way, other) for way in _exact_ways(answers) for other in ("full", "compact")),
    ]
    speed = {
        f"{one}_to_{other}": asdict(harness.ratio(token_ms[other], token_ms[one])) for one, other in pairs
    }
    moved = {name: parts[name]["body_bytes"] + parts[name]["head_bytes"] for name in parts}
    per_second = harness.bandwidth(case.threads)
    return {
        "model": case.name,
        "quantize": case.quantize,
        "stand": case.stand,
        **_sizes(case.folders["trimmed"]),
        "threads": case.threads,
        "tokens": case.tokens,
        "token_ms": {name: asdict(harness.spread(found)) for name, found in token_ms.items()},
        "token_ms_samples": token_ms,
        "speed": speed,
        "ceiling": moved["full"] / moved["trimmed"],
        "moved_bytes": moved,
        "copy_bytes_per_s": per_second,
        "ceiling_ms": {name: 1e3 * moved[name] / per_second for name in moved},
        **_outcome(answers, "exact"),
        **({"certified": _outcome(answers, "certified")} if "certified" in answers else {}),
        "terms_ms": terms,
        "cost_model": _cost_model(answers["exact"], terms["trimmed"]),
        "parts_ms": {name: _part_ms(found) for name, found in answers.items()},
        "memory": resident,
    }


def _exact_ways(answers: Mapping[str, Any]) -> list[str]:
    return [name for name in answers if WAYS[name].mode == "exact"]


def _outcome(answers: Mapping[str, Sequence[dict[str, Any]]], way: str) -> dict[str, Any]:
    return {"same_ids": _same(answers["full"], answers[way]), "drafts": _drafts(answers[way])}


def _same(full: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]]) -> float:
    """Share of answers with the full model's ids."""
    equal = sum(bool(a["ids"] == b["ids"]) for a, b in zip(full, other, strict=True))
    return equal / len(full)


def _sizes(folder: Path) -> dict[str, Any]:
    manifest = json.loads((folder / "trimserve.json").read_text("utf-8"))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return {
        "vocab_size": manifest["vocab_size"],
        "kept": manifest["kept"],
        "hidden_size": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "folder_bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
        "cold_bytes": sum(
            entry["bytes"] for name, entry in manifest["files"].items() if name.startswith("cold_")
        ),
    }


def _drafts(answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of all judged drafts the share that stood; drafts a token; tokens a check."""
    tokens, drafted, rejected = (
        sum(answer[key] for answer in answers) for key in ("tokens", "drafted", "rejected")
    )
    checks = sum(sum(answer["checks"].values()) for answer in answers)
    return {
        "stood": 1 - rejected / tokens,
        "per_token": drafted / tokens,
        "tokens_per_check": tokens / max(checks, 1),
        "cold_tokens": sum(answer["cold_tokens"] for answer in answers) / tokens,
    }


def _cost_model(answers: Sequence[dict[str, Any]], terms: Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds a token of exact mode from terms measured apart, and what was measured."""
    decoded = sum(answer["tokens"] - 1 for answer in answers)
    tokens = sum(answer["tokens"] for answer in answers)
    wasted = sum(answer["drafted"] for answer in answers) / tokens - 1
    sizes = np.array([int(size) for size in terms["cold"]])
    costs = np.array(list(terms["cold"].values()))
    checks = [(int(size), count) for answer in answers for size, count in answer["checks"].items()]
    cold = sum(count * float(np.interp(size, sizes, costs)) for size, count in checks) / tokens
    model = {
        "body": terms["body"],
        "compact_head": terms["head"],
        "cold": cold,
        "wasted": wasted * (terms["body"] + terms["head"]),
    }
    measured = sum(answer["ms"] for answer in answers) / decoded
    predicted = sum(model.values())
    return model | {"predicted": predicted, "measured": measured, "excess": measured / predicted - 1}


def _part_ms(answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds a token by part, prompts included, and the share that is not spent in ONNX Runtime."""
    tokens = sum(answer["tokens"] for answer in answers)
    names = answers[0]["part_ms"]
    parts = {name: sum(answer["part_ms"][name] for answer in answers) / tokens for name in names}
    run = sum(answer["run_ms"] for answer in answers) / tokens
    own = sum(parts.values()) - run - parts["cold_head"]
    return parts | {"own_share": own / sum(parts.values())}


def summary(row: Mapping[str, Any]) -> str:
    """One row for people."""
    title = f"{row['model']} {row['quantize'] or 'fp32'}, {row['layers']} layers, K = {row['kept']:,} of "
    title += f"V = {row['vocab_size']:,} x {row['hidden_size']}, {row['threads']} threads"
    times, memory = row["token_ms"], row["memory"]
    lines = [
        ("ms a token", *(f"{value['median']:.2f}" for value in times.values())),
        ("tokens/s", *(f"{1e3 / value['median']:.1f}" for value in times.values())),
        ("anonymous memory", *(human_bytes(memory[name]["anonymous"] or 0) for name in times)),
        ("file pages", *(human_bytes(memory[name]["file"] or 0) for name in times)),
    ]
    cost = row["cost_model"]
    speeds = [
        f"{name.replace('_', ' ')} {value['value']:.2f} ({value['low']:.2f} to {value['high']:.2f})"
        for name, value in row["speed"].items()
    ]
    outcomes = {"exact": row} | ({"certified": row["certified"]} if "certified" in row else {})
    own = [f"{name} {found['own_share']:.1%}" for name, found in row["parts_ms"].items()]
    return "\n".join(
        [
            title,
            table(("", *times), lines),
            f"speed: {', '.join(speeds)}; ceiling of compact to full {row['ceiling']:.2f} by bytes moved",
            *(
                f"{name}: {found['drafts']['stood']:.1%} of drafts stood, "
                f"{found['drafts']['per_token']:.2f} a token, "
                f"{found['drafts']['tokens_per_check']:.1f} tokens a cold product; ids equal those of full "
                f"in {found['same_ids']:.0%} of answers"
                for name, found in outcomes.items()
            ),
            f"cost model of exact, ms a token: body {cost['body']:.2f} + compact head "
            f"{cost['compact_head']:.2f} + cold product {cost['cold']:.2f} + wasted steps "
            f"{cost['wasted']:.2f} = {cost['predicted']:.2f}; measured {cost['measured']:.2f} "
            f"({cost['excess']:+.0%})",
            f"our own code: {', '.join(own)}; other processes had {row['others_cpu_share'] or 0:.0%} of the "
            "CPUs",
        ]
    )


def main() -> int:
    """Measure the chosen models, save a row each, print a table each."""
    parser = harness.parser(__doc__ or "", rounds=10)
    parser.add_argument(
        "--model", nargs="+", choices=(*SHAPES, REAL_MODEL), default=[*list(SHAPES)[:-1], REAL_MODEL]
    )
    parser.add_argument("--format", nargs="+", choices=("fp32", "int4", "int8"), default=["fp32", "int4"])
    parser.add_argument("--tokens", type=int, default=128, help="tokens an answer (default 128)")
    parser.add_argument("--prompt-tokens", type=int, default=32, help="tokens a random prompt (default 32)")
    parser.add_argument(
        "--stand", type=float, default=0.99, help="share of drafts to stand, of random models"
    )
    parser.add_argument("--coverage", type=float, default=0.99, help="of gsm8k, for multidomain-qwen2")
    parser.add_argument("--layers", type=int, help="fewer layers than the real shape has")
    parser.add_argument("--work", type=Path, help="folder for checkpoints and exports, which stay there")
    parser.add_argument("--prepare", action="store_true", help="make the models in --work and stop")
    args = parser.parse_args()
    if args.prepare and not args.work:
        parser.error("--prepare needs --work")
    rows = []
    for name in ["tiny"] if args.quick else args.model:
        for chosen in args.format:
            row = _measure_in(args, name, None if chosen == "fp32" else chosen)
            rows += [harness.without_samples(row)] if row else []
    harness.report("", {"rows": rows})
    return 0


def _measure_in(args: Any, name: str, quantize: str | None) -> dict[str, Any] | None:  # noqa: ANN401
    """Make one case in the folder for it, measure it and save its row; None with --prepare."""
    stand = args.coverage if name == REAL_MODEL else args.stand
    kept = args.work and args.work / f"{name}-{stand}"
    work = kept or Path(tempfile.mkdtemp(prefix=f"trimserve-decode-{name}-"))
    work.mkdir(parents=True, exist_ok=True)
    scratch = work / f"parts-{quantize or 'fp32'}"
    try:
        case = make_case(args, name, quantize, work)
        if args.prepare:
            return None
        row = measure(case, 2 if args.quick else args.rounds, scratch)
        harness.save_row("decode", row, quick=args.quick, device=args.device)
        print(summary(row), file=sys.stderr)
        return row
    finally:
        shutil.rmtree(scratch if kept else work, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
