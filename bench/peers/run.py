"""The same model through other tools, in processes that take turns: time a token, memory, and what comes out.

multidomain-qwen2 answers gsm8k questions greedily, in fp32 and in int4: untrimmed by this runtime, by optimum
and by onnxruntime-genai; pruned by onnxsim and run by ONNX Runtime with the shortest of loops; and trimmed by
this project, in exact and in compact mode. Compact mode with the prompt's cold ids in slots is VocabTailor's
idea (arXiv 2508.15229): a static vocab and the ids of the request.

Each tool has an environment of its own in build/peers, made on the first run. A tool that cannot run is
listed with the reason. Tools that cut the tokenizer are `bench.segmentation`'s question.
"""

import argparse
import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench import harness
from bench.peers.tools import PRECISIONS, Contender, Workshop, corpus, make_ours, model
from bench.quality import MODEL, held_out_texts, split
from trimserve.console import human_bytes, table

_PROMPTS = 6
UNTRIMMED = "trimserve, untrimmed"
GENAI = "onnxruntime-genai 0.18.0, untrimmed"
# Tools that a user would look at and that cannot take part.
_CANNOT = {
    "TextPruner 1.1.post2, hf-trim 3.0.1": "need a slow SentencePiece tokenizer",
    "VocabTailor": "is no package; its idea is measured as compact mode with the prompt's ids in slots",
    "TensorRT-Edge-LLM": "needs an NVIDIA GPU and TensorRT",
    "vllm-ascend, rtp-llm": "need their own accelerators",
}


def race(
    tools: Mapping[str, Contender], prompts: Sequence[Mapping[str, Any]], tokens: int, steps: int
) -> dict[str, dict[str, Any]]:
    """Let the tools answer the prompts in turn; medians, memory and agreement with `UNTRIMMED`."""
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(harness.Worker(tool.words, python=tool.python))
            for name, tool in tools.items()
        }
        answers: dict[str, list[dict[str, Any]]] = {name: [] for name in tools}
        for number in range(-1, steps):
            prompt = prompts[number % len(prompts)]
            requests = {name: tool.request(prompt, tokens) for name, tool in tools.items()}
            for name, (answer,) in harness.alternately(workers, requests, 1).items():
                if number >= 0:  # the first answer opens sessions and touches pages
                    answers[name].append(answer)
            workers = {name: workers[name] for name in reversed(list(workers))}
    return {
        name: {
            "ms": asdict(harness.spread(_ms(found))),
            "ms_samples": _ms(found),
            "first_ms": asdict(harness.spread([one["first_ms"] for one in found])),
            "memory": found[-1]["memory"],
            "same_ids": float(
                np.mean([_same(*pair) for pair in zip(answers[UNTRIMMED], found, strict=True)])
            ),
            "time_to": {
                other: asdict(harness.paired_ratio(_ms(found), _ms(answers[other])))
                for other in (UNTRIMMED, GENAI)
                if other in answers
            },
        }
        for name, found in answers.items()
    }


def _ms(answers: Sequence[Mapping[str, Any]]) -> list[float]:
    return [one["ms"] for one in answers]


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Share of the first answer's ids before the first difference; some tools go on after an end of text."""
    mine, theirs = one["ids"], other["ids"]
    same = 0
    while same < min(len(mine), len(theirs)) and mine[same] == theirs[same]:
        same += 1
    return same / max(1, len(mine))


HEADER = (
    "tool",
    "ms a token",
    "to untrimmed",
    "to genai",
    "ms to the first",
    "anonymous",
    "file pages",
    "same ids",
)


def lines(row: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The race for people, under `HEADER`."""
    return [
        (
            name,
            f"{one['ms']['median']:.2f}",
            *(
                f"{one['time_to'][other]['value']:.2f}" if other in one["time_to"] else ""
                for other in (UNTRIMMED, GENAI)
            ),
            f"{one['first_ms']['median']:.1f}",
            *(human_bytes(one["memory"][part] or 0) for part in ("anonymous", "file")),
            f"{one['same_ids']:.1%}",
        )
        for name, one in sorted(row["tools"].items(), key=lambda item: -item[1]["ms"]["median"])
    ]


def measure(work: Path, precision: str, args: argparse.Namespace) -> dict[str, Any]:
    """The race in one number format; returns the row for the result file."""
    from tokenizers import Tokenizer

    from trimserve.folder.manifest import read_manifest

    harness.fresh_process(["-m", "bench.peers.run", "--make", str(work), "--format", precision])
    tokenizer = Tokenizer.from_file(str(model() / "tokenizer.json"))
    texts = held_out_texts(split(corpus())[1], tokenizer, 24)
    prompts = [{"text": text, "ids": tokenizer.encode(text).ids} for text in texts.prompts[:_PROMPTS]]
    tools, reasons = Workshop(work, precision, args.threads).contenders()
    neighbours = harness.Neighbours()
    raced = race(tools, prompts, args.tokens, args.steps)
    manifest = read_manifest(work / "trimmed")
    return {
        "model": MODEL,
        "precision": precision,
        "vocab_size": manifest.vocab_size,
        "kept": manifest.kept,
        "threads": args.threads,
        "tokens": args.tokens,
        "tools": raced,
        "cannot_run": _CANNOT | reasons,
        "others_cpu_share": neighbours.share(),
    }


def main() -> int:
    """Measure, save a row a number format, print the tables and the reasons."""
    parser = harness.parser(__doc__ or "", rounds=1, work="exports")
    parser.add_argument("--format", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--steps", type=int, default=harness.MIN_STEPS, help="answers a tool (default 30)")
    parser.add_argument("--tokens", type=int, default=48, help="tokens an answer (default 48)")
    parser.add_argument("--make", type=Path, help="export ours into this folder (used by itself)")
    args = parser.parse_args()
    if args.make:
        make_ours(args.make, args.format[0])
        print("{}")
        return 0
    if args.quick:
        args.steps, args.tokens = 3, 16
    rows = []
    for precision in args.format:
        with harness.scratch_folder("peers", args.work) as work:
            rows.append(measure(work, precision, args))
        harness.save_row("peers", rows[-1], quick=args.quick)
        print(f"{precision}\n{table(HEADER, lines(rows[-1]))}", file=sys.stderr)
        for name, reason in rows[-1]["cannot_run"].items():
            print(f"cannot run: {name}: {reason}", file=sys.stderr)
    tools = [{name: harness.without_samples(one) for name, one in row["tools"].items()} for row in rows]
    harness.report("", {"rows": [row | {"tools": found} for row, found in zip(rows, tools, strict=True)]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
