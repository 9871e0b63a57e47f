"""Decoding, full against compact against exact: time, memory, and how much of the ceiling each reaches.

The full model is the untrimmed graph in the same runtime: exported like the trimmed one, with a vocab that
keeps every id. Each variant answers the same prompts greedily, one request at a time, in processes that
take turns; a token's time is that of all tokens but the first, so it holds no prompt. Beside the measured
times stand

- the ceiling: bytes of weights a token moves, full to compact (decoding one token at a time is bound by
  them), and the speed at which this machine copies memory;
- the cost model of exact mode, each term measured apart: the decoder's step for each token drafted, the cold
  product for each block checked, and what the rest of the time is.

Random weights make the models (`decode_models` says how drafts come to stand); multidomain-qwen2 is
trained, and answers gsm8k's questions.
"""

import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import harness
from bench.decode_models import SHAPES
from trimserve.report import human_bytes, table

VARIANTS = ("full", "compact", "exact")
SIZES = (1, 2, 4, 8, 16, 32)
REAL_MODEL = "multidomain-qwen2"
_COPY_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to generate: a process with a folder, and the mode it is asked for."""

    worker: harness.Worker
    mode: str | None

    def ask(self, request: str) -> dict[str, Any]:
        """Send a request in this mode."""
        return self.worker.ask(json.dumps(json.loads(request) | {"mode": self.mode}))


@dataclass(frozen=True, slots=True)
class Case:
    """One model in one number format, exported."""

    name: str
    quantize: str | None
    folders: Mapping[str, Path]
    prompts: Sequence[str]
    tokens: int
    threads: int

    def start(self, folder: str) -> harness.Worker:
        """A worker with the full or the trimmed folder."""
        path = str(self.folders[folder].resolve())
        return harness.Worker(["-m", "bench.decode_worker", path, "--threads", str(self.threads)])

    def request(self, number: int) -> str:
        """The request for the prompt of a step."""
        return json.dumps({"prompt": self.prompts[number % len(self.prompts)], "tokens": self.tokens})


def make_case(args: Any, name: str, quantize: str | None, work: Path) -> Case:  # noqa: ANN401
    """Export a model in a process of its own."""
    data = os.environ.get("TRIMSERVE_DATA", str(harness.ROOT.parent / "shared" / "data"))
    stand = args.coverage if name == REAL_MODEL else args.stand
    words = ["-m", "bench.decode_models", name, "--work", str(work), "--data", data, "--stand", str(stand)]
    words += ["--prompt-tokens", str(args.prompt_tokens)]
    words += ["--quantize", quantize] if quantize else []
    words += ["--layers", str(args.layers)] if args.layers else []
    made = harness.fresh_process(words)
    folders = {folder: Path(made[folder]) for folder in ("full", "trimmed")}
    return Case(name, quantize, folders, made["prompts"], args.tokens, args.threads)


def measure(case: Case, steps: int, scratch: Path) -> dict[str, Any]:
    """Measure one case; returns the row for the result file."""
    parts = {name: _parts(folder, scratch / name) for name, folder in case.folders.items()}
    resident = _resident(case)
    neighbours = harness.Neighbours()
    with case.start("full") as full, case.start("trimmed") as trimmed:
        variants = {
            "full": Variant(full, None),
            "compact": Variant(trimmed, "compact"),
            "exact": Variant(trimmed, "exact"),
        }
        for variant in variants.values():  # opens every session and touches every page
            variant.ask(case.request(0))
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in VARIANTS}
        for number in range(steps):
            for name in VARIANTS[:: 1 if number % 2 == 0 else -1]:
                answers[name].append(variants[name].ask(case.request(number)))
        context = len(case.prompts[0].split()) + case.tokens // 2
        terms = {
            "full": full.ask(json.dumps(_terms_request(parts["full"], context))),
            "trimmed": trimmed.ask(json.dumps(_terms_request(parts["trimmed"], context))),
        }
    others = {"others_cpu_share": neighbours.share(), "load_average": os.getloadavg()[0]}
    return _row(case, answers, terms, parts, resident) | others


def _parts(folder: Path, scratch: Path) -> dict[str, Any]:
    # In a process of its own: onnx_ir keeps files open that are to be deleted.
    return harness.fresh_process(["-m", "bench.decode_parts", str(folder / "model.onnx"), str(scratch)])


def _terms_request(parts: Mapping[str, Any], context: int) -> dict[str, Any]:
    return {"context": context, "sizes": SIZES, "body": parts["body"], "head": parts["head"]}


def _resident(case: Case) -> dict[str, dict[str, int]]:
    """Memory of each variant in a process of its own, after a short answer."""
    modes = {"full": ("full", None), "compact": ("trimmed", "compact"), "exact": ("trimmed", "exact")}
    found = {}
    for name, (folder, mode) in modes.items():
        with case.start(folder) as worker:
            request = {"prompt": case.prompts[0], "tokens": min(case.tokens, 32), "mode": mode}
            found[name] = worker.ask(json.dumps(request))["memory"]
    return found


def _row(
    case: Case,
    answers: Mapping[str, Sequence[dict[str, Any]]],
    terms: Mapping[str, dict[str, Any]],
    parts: Mapping[str, dict[str, Any]],
    resident: Mapping[str, dict[str, int]],
) -> dict[str, Any]:
    token_ms = {
        name: [answer["ms"] / max(answer["tokens"] - 1, 1) for answer in answers[name]] for name in VARIANTS
    }
    speed = {
        f"{one}_to_{other}": asdict(harness.ratio(token_ms[other], token_ms[one]))
        for one, other in (("compact", "full"), ("exact", "full"), ("exact", "compact"))
    }
    same = [a["ids"] == b["ids"] for a, b in zip(answers["full"], answers["exact"], strict=True)]
    moved = {name: parts[name]["body_bytes"] + parts[name]["head_bytes"] for name in parts}
    gigabytes = bandwidth(case.threads)
    return {
        "model": case.name,
        "quantize": case.quantize,
        **_sizes(case.folders["trimmed"]),
        "threads": case.threads,
        "tokens": case.tokens,
        "token_ms": {name: asdict(harness.spread(token_ms[name])) for name in VARIANTS},
        "token_ms_samples": token_ms,
        "speed": speed,
        "ceiling": moved["full"] / moved["trimmed"],
        "moved_bytes": moved,
        "copy_bytes_per_s": gigabytes,
        "ceiling_ms": {name: 1e3 * moved[name] / gigabytes for name in moved},
        "same_ids": sum(same) / len(same),
        "drafts": _drafts(answers["exact"]),
        "terms_ms": terms,
        "cost_model": _cost_model(answers["exact"], terms["trimmed"]),
        "compact_parts_ms": _part_ms(answers["compact"]),
        "exact_parts_ms": _part_ms(answers["exact"]),
        "memory": resident,
    }


def _sizes(folder: Path) -> dict[str, Any]:
    manifest = json.loads((folder / "trimserve.json").read_text("utf-8"))
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return {
        "vocab_size": manifest["vocab_size"],
        "kept": manifest["kept"],
        "hidden_size": config["hidden_size"],
        "layers": config["num_hidden_layers"],
        "folder_bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
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
    """Milliseconds a token by part, prompts included, and the share that is our own code."""
    tokens = sum(answer["tokens"] for answer in answers)
    names = answers[0]["part_ms"]
    parts = {name: sum(answer["part_ms"][name] for answer in answers) / tokens for name in names}
    own = parts["sampler"] + parts["other"]
    return parts | {"own_share": own / sum(parts.values())}


def bandwidth(threads: int) -> float:
    """Bytes a second that threads read and write together copying large arrays, the best of five."""
    size = _COPY_BYTES // threads // 8
    arrays = [(np.ones(size), np.empty(size)) for _ in range(threads)]
    best = 0.0
    for _ in range(5):
        workers = [threading.Thread(target=np.copyto, args=(target, source)) for source, target in arrays]
        begin = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, 2 * 8 * size * threads / (time.perf_counter() - begin))
    return best


HEADER = ("", *VARIANTS)


def summary(row: Mapping[str, Any]) -> str:
    """One row for people."""
    title = f"{row['model']} {row['quantize'] or 'fp32'}, {row['layers']} layers, K = {row['kept']:,} of "
    title += f"V = {row['vocab_size']:,} x {row['hidden_size']}, {row['threads']} threads"
    times, memory = row["token_ms"], row["memory"]
    lines = [
        ("ms a token", *(f"{times[name]['median']:.2f}" for name in VARIANTS)),
        ("tokens/s", *(f"{1e3 / times[name]['median']:.1f}" for name in VARIANTS)),
        ("anonymous memory", *(human_bytes(memory[name]["anonymous"] or 0) for name in VARIANTS)),
        ("file pages", *(human_bytes(memory[name]["file"] or 0) for name in VARIANTS)),
    ]
    drafts, cost = row["drafts"], row["cost_model"]
    speeds = [
        f"{name.replace('_', ' ')} {value['value']:.2f} ({value['low']:.2f} to {value['high']:.2f})"
        for name, value in row["speed"].items()
    ]
    return "\n".join(
        [
            title,
            table(HEADER, lines),
            f"speed: {', '.join(speeds)}; ceiling of compact to full {row['ceiling']:.2f} by bytes moved",
            f"drafts: {drafts['stood']:.1%} stood, {drafts['per_token']:.2f} a token, "
            f"{drafts['tokens_per_check']:.1f} tokens a check; ids of exact equal those of full in "
            f"{row['same_ids']:.0%} of answers",
            f"cost model, ms a token: body {cost['body']:.2f} + compact head {cost['compact_head']:.2f} + "
            f"cold product {cost['cold']:.2f} + wasted steps {cost['wasted']:.2f} = "
            f"{cost['predicted']:.2f}; measured {cost['measured']:.2f} ({cost['excess']:+.0%})",
            f"our own code: {row['compact_parts_ms']['own_share']:.1%} of compact, "
            f"{row['exact_parts_ms']['own_share']:.1%} of exact; other processes had "
            f"{row['others_cpu_share'] or 0:.0%} of the CPUs",
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
    parser.add_argument("--work", type=Path, help="folder for checkpoints and exports (default: temporary)")
    args = parser.parse_args()
    models = ["tiny"] if args.quick else args.model
    rows = []
    for name in models:
        work = Path(tempfile.mkdtemp(prefix=f"trimserve-decode-{name}-", dir=args.work))
        try:
            for chosen in args.format:
                case = make_case(args, name, None if chosen == "fp32" else chosen, work)
                row = measure(case, 2 if args.quick else args.rounds, work / f"parts-{chosen}")
                harness.save_row("decode", row, quick=args.quick)
                print(summary(row), file=sys.stderr)
                rows.append({key: value for key, value in row.items() if not key.endswith("_samples")})
                for folder in (*case.folders.values(), work / f"parts-{chosen}"):
                    shutil.rmtree(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    harness.report("", {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
