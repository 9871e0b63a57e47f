"""`trimserve inspect`: what a path is, its vocab tensors, and the most that trimming saves."""

import argparse
import importlib
from typing import Any

from trimserve.cli.arguments import positive
from trimserve.cli.output import emit
from trimserve.cli.rules import flag, given
from trimserve.console import human_bytes, percent, table
from trimserve.errors import UsageError
from trimserve.folder.fusion import describe_fusion

_KEPT = 16_384
_BY_HEADERS = (
    "By names and shapes in the files. Whether the model can be exported is told where trimserve[export] is "
    "installed."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "path", metavar="PATH", help="model folder or hub id, trimmed folder, GGUF or ONNX file"
    )
    parser.add_argument("--revision", help="hub branch, tag or commit of the model")
    parser.add_argument(
        "--kept", type=positive, metavar="K", help=f"rows to compute the maximum saving for ({_KEPT:,})"
    )


def run(args: argparse.Namespace) -> int:
    """Inspect and report."""
    # Another package, which the light one never imports before it is asked to.
    inspection = importlib.import_module("trimserve_export.inspection")
    found = inspection.inspect(args.path, kept=args.kept or _KEPT, revision=args.revision)
    document = inspection.to_dict(found)
    if document["kind"] != "model" and (names := given(args, ("kept", "revision"))):
        raise UsageError(
            f"{flag(names[0])} is about the model to trim, and {args.path} is none: leave it out."
        )
    summary = {"model": _model_summary, "trimmed": _trimmed_summary, "onnx": _onnx_summary}
    emit(args, document, summary[document["kind"]](document))
    return 0


def _model_summary(model: dict[str, Any]) -> str:
    facts = [
        ("model", f"{model['path']}: {model['architecture']} ({model['model_type']})"),
        ("vocab size", f"{model['vocab_size']:,} rows, {model['tokenizer_size']:,} tokens in the tokenizer"),
        ("head", _head_text(model)),
        ("weights", human_bytes(model["weight_bytes"])),
    ]
    tensors = [
        (
            tensor["name"],
            tensor["role"],
            " x ".join(map(str, tensor["shape"])),
            tensor["dtype"],
            human_bytes(tensor["bytes"]),
        )
        for tensor in model["vocab_tensors"]
    ]
    notes = [] if model["told_by"] == "class" else [_BY_HEADERS]
    return "\n\n".join(
        [
            _lines(facts),
            table(["vocab tensor", "role", "shape", "dtype", "bytes"], tensors),
            _lines(_prize_facts(model["prize"])),
            *notes,
        ]
    )


def _head_text(model: dict[str, Any]) -> str:
    if model["tied"]:
        return "tied to the embedding"
    has_head = any(tensor["role"] == "head" for tensor in model["vocab_tensors"])
    return "its own matrix" if has_head else "none over the vocab"


def _prize_facts(prize: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [
        ("vocab's share", f"{percent(prize['vocab_share'])} of the weights: no vocab removes more"),
        (f"at K = {prize['kept']:,}", f"{human_bytes(prize['bytes_removed'])} fewer"),
    ]
    if prize["decode_ratio"] is not None:
        facts.append(
            ("decoding", f"at most {prize['decode_ratio']:.2f} x faster, by weight bytes read a token")
        )
    return facts


def _trimmed_summary(folder: dict[str, Any]) -> str:
    verified = {None: "not yet", True: "yes", False: "FAILED"}[folder["verified"]]
    coverage = "unknown" if folder["coverage"] is None else f"{percent(folder['coverage'])} of the profile"
    share = percent(folder["kept"] / folder["vocab_size"])
    facts = [
        ("trimmed folder", folder["path"]),
        ("base model", folder["base_model"]),
        ("task", f"{folder['task']}, {folder['dtype']}"),
        ("vocab rows", f"{folder['kept']:,} of {folder['vocab_size']:,} ({share})"),
        *([("head rows", f"{folder['head_rows']:,}")] if folder["head_rows"] else []),
        ("coverage", coverage),
        ("tokenizer", folder["tokenizer"]),
        ("cut", ", ".join(folder["cut"])),
        ("cold rows", human_bytes(folder["cold_bytes"]) if folder["cold_bytes"] else "left out"),
        *([("attention", describe_fusion(folder["fusion"]))] if folder["fusion"] else []),
        ("bytes", human_bytes(folder["bytes"])),
        ("verified", verified),
    ]
    return _lines(facts)


def _onnx_summary(graph: dict[str, Any]) -> str:
    return f"{graph['path']}: ONNX graph, {human_bytes(graph['bytes'])} with its data; {graph['note']}."


def _lines(facts: list[tuple[str, str]]) -> str:
    return "\n".join(f"{name:<16}{value}" for name, value in facts)
