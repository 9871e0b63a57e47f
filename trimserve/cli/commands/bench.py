"""`trimserve bench`: the full model against a trimmed folder, in processes that take turns."""

import argparse
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from trimserve.cli.arguments import add_memory, named_path, positive
from trimserve.cli.output import emit
from trimserve.console import human_bytes, percent, table
from trimserve.errors import UsageError, require
from trimserve.folder.tasks import GENERATOR_TASKS

if TYPE_CHECKING:
    from trimserve.benchmark.compare import Comparison, Measured
    from trimserve.folder.opening import TrimmedFolder
    from trimserve.model.source import ModelSource

_NEW_TOKENS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("folder", type=named_path, metavar="DIR", help="the trimmed folder (layout runtime)")
    parser.add_argument(
        "-m", "--model", help="the full model: a folder, GGUF file or hub id (default: the folder's source)"
    )
    parser.add_argument("--revision", help="hub revision of the model")
    parser.add_argument(
        "--texts", metavar="FILE", help="a batch (encoders) or prompts (generators), one a line; - for stdin"
    )
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="processes a variant (3)")
    parser.add_argument("--steps", type=positive, default=10, metavar="N", help="timed steps a process (10)")
    parser.add_argument(
        "--max-new-tokens", type=positive, metavar="N", help=f"tokens an answer ({_NEW_TOKENS})"
    )
    parser.add_argument("--threads", type=positive, metavar="N", help="CPU threads of one operator")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the models run")
    add_memory(parser)


def run(args: argparse.Namespace) -> int:
    """Export the full model into a temporary folder, measure both, report."""
    from trimserve.benchmark.compare import Settings, compare
    from trimserve.cli.inputs import read_lines
    from trimserve.files.scratch import scratch_folder
    from trimserve.folder.opening import open_folder
    from trimserve.loading import check_runnable
    from trimserve.model.resolve import resolve_source
    from trimserve.process import available_cpus
    from trimserve.runtime.session import providers

    begin = time.perf_counter()
    runtime = require("onnxruntime", extra="cpu", purpose="trimserve bench")
    providers(runtime, args.device)  # says what is missing before minutes of export
    trimmed = open_folder(args.folder)
    check_runnable(trimmed)
    if args.max_new_tokens is not None and trimmed.manifest.task not in GENERATOR_TASKS:
        raise UsageError(
            f"{args.folder} does {trimmed.manifest.task}, for which --max-new-tokens means nothing: leave it "
            "out."
        )
    untrimmed = require("trimserve_export.full_model", extra="export", purpose="trimserve bench")
    texts = _ordinary_texts() if args.texts is None else read_lines(args.texts)
    manifest = trimmed.manifest
    source = resolve_source(manifest.source, args.model, args.revision)
    settings = Settings(
        args.rounds,
        args.steps,
        args.max_new_tokens or _NEW_TOKENS,
        args.threads or available_cpus(),
        args.device,
        args.memory,
    )
    whole = require("trimserve_export.source.whole", extra="export", purpose="trimserve bench")
    with scratch_folder("bench") as scratch, whole.whole_source(source) as source:
        full = scratch / "full"
        untrimmed.export_untrimmed(trimmed, source, full)
        try:
            found = compare(full, args.folder.resolve(), texts, settings)
        except RuntimeError as error:
            raise UsageError(
                f"a process of the benchmark failed ({error}): its message is above. Models of this size "
                "may need more memory than is free."
            ) from error
        prize = _decode_prize(source, manifest.head_rows or manifest.kept)
    document = _document(trimmed, found, prize)
    document |= {
        "texts": len(texts),
        "threads": settings.threads,
        "device": args.device,
        "seconds": round(time.perf_counter() - begin, 3),
    }
    emit(args, document, _text(document, found))
    return 0


def _ordinary_texts() -> list[str]:
    from trimserve_export.verify.texts import ORDINARY

    return list(ORDINARY)


def _decode_prize(source: "ModelSource", head_rows: int) -> float | None:
    """How much faster decoding can become at most; None for encoders and graphs without a checkpoint."""
    if source.graph is not None:
        return None
    from trimserve_export.inspection import inspect

    ratio: float | None = inspect(source.path, kept=head_rows).prize.decode_ratio  # type: ignore[union-attr]
    return ratio


def _document(trimmed: "TrimmedFolder", found: "Comparison", prize: float | None) -> dict[str, Any]:
    manifest = trimmed.manifest
    others = [name for name in found.variants if name != "full"]
    decodes = "compact" in found.variants
    ratios = {name: found.time_ratio(name) for name in others}
    return {
        "task": manifest.task,
        "vocab_size": manifest.vocab_size,
        "kept": manifest.kept,
        "variants": {name: measured.to_dict() for name, measured in found.variants.items()},
        "time_ratio": {
            name: {"value": one.value, "low": one.low, "high": one.high} for name, one in ratios.items()
        },
        "removed_bytes": found.removed_bytes,
        "saved_share": {name: found.saved_share(name) for name in others},
        "same_results": {name: found.same_results(name) for name in others if name != "compact"},
        "prize": {"decode_ratio": prize if decodes else None, "bytes": found.removed_bytes},
        "speed_to_prize": {
            name: 1 / one.value / prize if decodes and prize else None for name, one in ratios.items()
        },
    }


def _text(document: dict[str, Any], found: "Comparison") -> str:
    names = list(found.variants)
    unit = "ms a token" if "compact" in names else f"ms for {document['texts']} texts"
    rows = [(label, *(read(found.variants[name]) for name in names)) for label, read in _LINES]
    rows.append((unit, *(f"{found.variants[name].ms.median:.2f}" for name in names)))
    if "compact" in names:
        rows.append(("ms to the first token", *(_median(found.variants[name].first_ms) for name in names)))
    lines = [
        f"{document['task']}: K = {document['kept']:,} of V = {document['vocab_size']:,}, "
        f"{document['threads']} threads, {document['device']}",
        "",
        table(("", *names), rows),
        "",
    ]
    return "\n".join(lines + [_verdict(name, document) for name in names if name != "full"])


def _verdict(name: str, document: dict[str, Any]) -> str:
    ratio, share = document["time_ratio"][name], document["saved_share"][name]
    text = f"{name}: {ratio['value']:.2f} of the full model's time "
    text += f"(95 % interval {ratio['low']:.2f} to {ratio['high']:.2f})"
    if (to_prize := document["speed_to_prize"][name]) is not None:
        text += f", {percent(to_prize)} of the {document['prize']['decode_ratio']:.2f} x it could gain"
    if share is not None:  # above 1: copies that kernels pack of the removed rows are gone as well
        removed = document["removed_bytes"]
        text += f"; {human_bytes(share * removed)} less memory, {share:.2f} of the bytes removed"
    same = document["same_results"].get(name)
    return text + {None: ".", True: "; the same results.", False: "; results that DIFFER."}[same]


def _median(found: Any) -> str:  # noqa: ANN401
    return "-" if found is None else f"{found.median:.2f}"


def _size(count: int | None) -> str:
    return "-" if count is None else human_bytes(count)


_LINES: tuple[tuple[str, Callable[["Measured"], str]], ...] = (
    ("graph and weights", lambda measured: human_bytes(measured.weight_bytes)),
    ("ms to load", lambda measured: f"{measured.load_ms.median:.0f}"),
    ("resident memory", lambda measured: human_bytes(measured.memory.resident)),
    ("- of it anonymous", lambda measured: _size(measured.memory.anonymous)),
    ("- of it file pages", lambda measured: _size(measured.memory.file)),
    ("largest resident memory", lambda measured: _size(measured.memory.peak)),
)
