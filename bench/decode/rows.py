"""The row of a decoding benchmark: ratios, ceiling, outcome and cost model from what was measured."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench import harness
from bench.decode.case import WAYS, Case
from trimserve.console import human_bytes, table


def make_row(
    case: Case,
    answers: Mapping[str, Sequence[dict[str, Any]]],
    terms: Mapping[str, dict[str, Any]],
    parts: Mapping[str, dict[str, Any]],
    resident: Mapping[str, dict[str, int]],
) -> dict[str, Any]:
    """The row for the result file.

    Args:
        case: what was measured.
        answers: what the worker said of each request, by way.
        terms: milliseconds of the parts of a step, by folder.
        parts: the graph's weights in bytes, by folder.
        resident: memory of each way in a process of its own.
    """
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
