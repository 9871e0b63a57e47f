"""`trimserve export`: make a trimmed folder from a model."""

import argparse
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimserve.cli.arguments import (
    add_reading_arguments,
    add_selection_arguments,
    named_path,
    reading_options,
    selection_options,
)
from trimserve.cli.inputs import load_profiles
from trimserve.cli.output import emit
from trimserve.cli.rules import Rule, check
from trimserve.errors import UsageError, require

if TYPE_CHECKING:
    from trimserve.corpus.documents import Reading
    from trimserve.corpus.files import CorpusSource
    from trimserve.model.source import ModelSource
    from trimserve.profiles.profile import Profile
    from trimserve_export.layouts.segmentation import Sample


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "-m", "--model", required=True, help="folder, GGUF file or hub id of the model to trim"
    )
    parser.add_argument("--revision", help="hub branch, tag or commit of the model")
    parser.add_argument("-o", "--output", required=True, type=named_path, help="folder to make")
    base = "the model that a compact checkpoint of fine-tuning was cut from (default: the one it names)"
    parser.add_argument("--base", help=base)
    parser.add_argument(
        "--adapter", metavar="DIR", help="LoRA or another adapter to merge into the model (peft)"
    )
    ids = parser.add_argument_group("kept ids").add_mutually_exclusive_group()
    ids.add_argument("--vocab", type=named_path, metavar="F", help="vocab written by `trimserve select`")
    ids.add_argument("--profile", nargs="+", metavar="[NAME=]P", help="profiles to select from")
    ids.add_argument("--corpus", nargs="+", metavar="FILE", help="texts to profile and select from")
    read = "how files of --corpus, --held-out and --calibrate are read"
    add_reading_arguments(parser.add_argument_group(read))
    add_selection_arguments(parser)
    _add_export_arguments(parser)


def _add_export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", default="auto", help="e.g. feature-extraction (default: by architecture)")
    exporters = ("auto", "optimum", "transformers", "genai")
    parser.add_argument("--exporter", default="auto", choices=exporters, help="what makes the graph")
    devices = ("cpu", "cuda", "webgpu")
    parser.add_argument("--device", default="cpu", choices=devices, help="of the graph (--exporter genai)")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "fp16", "bf16"), help="of the weights")
    layouts = ("runtime", "tokenizer", "graph")
    parser.add_argument("--layout", default="runtime", choices=layouts, help="where ids are remapped")
    held_out = "texts to compare the cut tokenizer on (--layout tokenizer)"
    parser.add_argument("--held-out", nargs="+", metavar="FILE", help=held_out)
    parser.add_argument("--to", default="onnx", choices=("onnx", "safetensors", "gguf"), help="what to write")
    parser.add_argument("--quantize", choices=("int4", "int8"), help="round the weights, in blocks of 32")
    bits = "of the vocab head's rows with --quantize (default: 8)"
    parser.add_argument("--vocab-bits", type=int, choices=(4, 8), help=bits)
    calibrate = "texts of the domain that --quantize rounds by (default: the corpus, if it is at hand)"
    parser.add_argument("--calibrate", nargs="+", metavar="FILE", help=calibrate)
    no_quality = "quantise without texts: no rounding by them, no measure of what it costs"
    parser.add_argument("--no-calibration", action="store_const", const=True, help=no_quality)
    parser.add_argument(
        "--sketch",
        choices=("int8", "int4", "none"),
        help="bounds of the cold rows, which exact mode proves with (default: int8, for heads in floats)",
    )
    parser.add_argument("--no-cold", dest="cold", action="store_false", help="leave the cold rows out")
    parser.add_argument("--variant", metavar="V", help="of several ONNX graphs of a model, e.g. q4")
    parser.add_argument("--link", action="store_true", help="hard-link an ONNX graph's untouched weights")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that trimserve made")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code of the model's folder")


def run(args: argparse.Namespace) -> int:
    """Select if asked to, export, report."""
    from trimserve.folder.staging import check_target
    from trimserve.model.resolve import resolve_model
    from trimserve.profiles.merging import add_up
    from trimserve.selection.select_ids import select
    from trimserve.vocab.file import load_vocab

    options = selection_options(args)
    if args.vocab is not None and any(options.values()):
        raise UsageError("--vocab already says which ids stay: leave out the options that select.")
    if args.held_out and args.layout != "tokenizer":
        raise UsageError("--held-out compares tokenizers, and only --layout tokenizer has two: leave it out.")
    _check_reading(args)
    check(args, _RULES)
    check_target(args.output, overwrite=args.overwrite)  # before minutes of work
    exporter = require("trimserve_export.pipeline", extra="export", purpose="trimserve export")
    settings = {field.name: getattr(args, field.name) for field in dataclasses.fields(exporter.Options)}
    exporter.Options(**settings)  # refuses what is not built before a corpus is read
    whole = require("trimserve_export.source.whole", extra="export", purpose="trimserve export")
    checkpoint = resolve_model(args.model, revision=args.revision)
    _check_source(args, checkpoint)
    if args.vocab is None and args.profile is None and args.corpus is None:
        args.vocab = _own_vocab(checkpoint, options)
    trusted = {"trust_remote_code": args.trust_remote_code}
    with whole.whole_source(
        checkpoint,
        args.base,
        adapter=args.adapter,
        near=args.output.parent,
        dequantize=args.to != "gguf",
        **trusted,
    ) as source:
        exporter.check_early(source, exporter.Options(**settings))  # before minutes of reading a corpus
        profiles = _profiles(args, source)
        vocab = load_vocab(args.vocab) if profiles is None else select(profiles, model=source, **options)
        if args.layout == "tokenizer":
            profile = add_up(list(profiles.values())) if isinstance(profiles, dict) else profiles
            settings |= {"profile": profile, "sample": _sample(args, source, profile)}
        rounds = args.quantize is not None and args.device == "cpu" and args.to == "onnx"
        if rounds and not args.no_calibration:
            settings["calibration"] = _calibration(args, source, profiles)
        result = exporter.export(source, vocab, args.output, overwrite=args.overwrite, **settings)
    document: dict[str, Any] = result.to_dict()
    emit(args, document, _summary(document))
    return 0


# The defaults of these options are choices, so the rules look at what was chosen.
_RULES = (
    Rule(
        ("sketch",),
        lambda args: (
            args.sketch == "none" or (args.cold and args.layout != "tokenizer" and args.to == "onnx")
        ),
        "bounds the cold rows of an ONNX folder, and this export writes none: leave it out.",
    ),
    Rule(
        ("exporter",),
        lambda args: args.exporter == "auto" or args.to == "onnx",
        "makes a graph and --to safetensors or gguf makes none: leave one of them out.",
    ),
    Rule(
        ("device",),
        lambda args: args.device == "cpu" or args.to == "onnx",
        "is about a graph and --to safetensors or gguf makes none: leave one of them out.",
    ),
    Rule(
        ("vocab_bits", "calibrate", "no_calibration"),
        lambda args: args.quantize is not None,
        "says how --quantize rounds: leave it out, or add --quantize.",
    ),
    Rule(
        ("vocab_bits", "calibrate", "no_calibration"),
        lambda args: args.device == "cpu",
        "means nothing to the builder that quantises graphs for other devices: leave it out.",
    ),
    Rule(
        ("calibrate", "no_calibration"),
        lambda args: args.to != "gguf",
        "is about rounding by texts, and --to gguf rounds as llama.cpp's formats are: leave it out.",
    ),
    Rule(
        ("calibrate",),
        lambda args: not args.no_calibration,
        "gives texts that --no-calibration does without: leave one of them out.",
    ),
)


def _check_source(args: argparse.Namespace, source: "ModelSource") -> None:
    """Refuse options about another kind of model than the one at hand."""
    from trimserve.finetune.restoring import is_compact

    if args.link and source.graph is None and args.variant is None:
        raise UsageError(
            f"--link is about the weights of ONNX graphs, and {args.model} has none: leave it out."
        )
    if args.base is not None and args.adapter is None and not is_compact(source.path):
        raise UsageError(
            f"--base names the model that a compact checkpoint of fine-tuning was cut from, and {args.model} "
            "is no such checkpoint: leave it out."
        )


def _check_reading(args: argparse.Namespace) -> None:
    # The files of a profile are read again, to compare segmentations or to quantise by.
    again = args.layout == "tokenizer" or (args.quantize and not args.no_calibration)
    reads = args.corpus or args.held_out or args.calibrate or (args.profile and again)
    if reading_options(args) and not reads:
        raise UsageError(
            "--text-column, --output-column, --chat, --unit and --skip-bad say how files are read: name such "
            "files with --corpus, or leave the options out."
        )


def _own_vocab(source: "ModelSource", options: dict[str, Any]) -> Path:
    """A compact checkpoint brings its vocab along; for any other model it has to be said which ids stay."""
    from trimserve.finetune.restoring import is_compact
    from trimserve.folder.names import VOCAB_NAME

    if not is_compact(source.path) or any(options.values()):
        raise UsageError(
            "one of the arguments --vocab --profile --corpus is required: it says which ids stay."
        )
    return source.path / VOCAB_NAME


def _profiles(args: argparse.Namespace, source: "ModelSource") -> "Profile | dict[str, Profile] | None":
    """What to select from: profiles by name, or one of a corpus; None where a vocab was given."""
    from trimserve.profiles.profiling import profile

    if args.profile is not None:
        return load_profiles(args.profile)
    if args.corpus is not None:
        return profile(args.corpus, source, **reading_options(args))
    return None


def _sample(args: argparse.Namespace, source: "ModelSource", profile: "Profile | None") -> "Sample | None":
    """Texts to compare tokenizers on: held-out ones if there are any, else those that were profiled."""
    from trimserve.profiles.profiling import reading_of
    from trimserve_export.layouts.segmentation import Sample

    options: Any = reading_options(args)
    reading = reading_of(source, options)
    if args.held_out:
        return Sample.of_files(args.held_out, reading, held_out=True)
    files = _files_at_hand(profile, reading)
    return Sample.of_files(files, reading, held_out=False) if files else None


def _calibration(
    args: argparse.Namespace, source: "ModelSource", profiles: "Profile | dict[str, Profile] | None"
) -> "Iterable[str] | None":
    """Texts of the domain: those given, else those that were profiled and are still there."""
    from trimserve.corpus.corpus import Corpus
    from trimserve.profiles.merging import add_up
    from trimserve.profiles.profiling import reading_of

    options: Any = reading_options(args)
    reading = reading_of(source, options)
    profile = add_up(list(profiles.values())) if isinstance(profiles, dict) else profiles
    files = args.calibrate or _files_at_hand(profile, reading)
    return (document.text for document in Corpus(files, reading=reading).documents()) if files else None


def _files_at_hand(profile: "Profile | None", reading: "Reading") -> list[str]:
    sources = profile.sources if profile is not None else ()
    return [counted.name for counted in sources if _is_at_hand(counted, reading)]


def _is_at_hand(counted: "CorpusSource", reading: "Reading") -> bool:
    """Whether a profiled file still lies where it did, unchanged, and the options say how it is read."""
    from trimserve.corpus.corpus import can_read
    from trimserve.files.hashes import sha256_file

    path = Path(counted.name)
    return path.is_file() and can_read(path, reading) and sha256_file(path) == counted.sha256


def _summary(document: dict[str, Any]) -> str:
    from trimserve.console import human_bytes, percent, table

    kept, head, size = document["kept"], document["head_rows"], document["vocab_size"]
    before, after = document["bytes_before"], document["bytes_after"]
    rows = [
        ["vocab rows", f"{size:,}", f"{kept:,}", percent(kept / size)],
        *([["  in the head", f"{size:,}", f"{head:,}", percent(head / size)]] if head else []),
        ["weights", human_bytes(before), human_bytes(after), percent(after / before)],
    ]
    files = ", ".join(f"{name} {human_bytes(count)}" for name, count in document["files"].items())
    return "\n".join(
        [
            table(["", "full", "trimmed", "share"], rows),
            *_segmentation(document),
            *_exporter(document),
            *_quality(document),
            "",
            f"{document['path']}: {files}",
            f"{document['seconds']:.1f} s, peak memory {human_bytes(document['peak_rss_bytes'])}",
        ]
    )


def _exporter(document: dict[str, Any]) -> list[str]:
    chosen = document["exporter"]
    return [] if chosen is None else ["", f"Exporter: {chosen['name']} ({chosen['reason']})"]


def _quality(document: dict[str, Any]) -> list[str]:
    if document["quality"] is None:
        return []
    from trimserve_export.serving.quality import Quality

    return ["", f"Quantised: {Quality.from_dict(document['quality']).describe()}"]


def _segmentation(document: dict[str, Any]) -> list[str]:
    if document["segmentation"] is None:
        return []
    from trimserve_export.layouts.segmentation import describe_segmentation

    return ["", f"Segmentation: {describe_segmentation(document['segmentation'])}"]
