"""`trimserve finetune`: check training texts against a vocab, and restore full checkpoints."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimserve.cli.arguments import named_path
from trimserve.cli.output import emit
from trimserve.errors import MismatchError, UsageError

if TYPE_CHECKING:
    from trimserve.finetune.texts import Outside
    from trimserve.model.source import ModelSource
    from trimserve.vocab.map import VocabMap

_SHOWN = 5  # texts that an error names
_BATCH_TEXTS = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the commands below `finetune`."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_restore(actions.add_parser("restore", help="write the full checkpoint of a compact one"))
    _add_check(actions.add_parser("check", help="find training texts with ids outside a vocab"))


def _add_restore(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=named_path, help="folder saved inside a partial_vocab block")
    parser.add_argument("--base", help="the model it was cut from (default: the one the checkpoint names)")
    parser.add_argument("-o", "--output", required=True, type=named_path, help="folder to make")
    _add_format(parser)


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("corpus", nargs="+", metavar="FILE", help="training texts: .txt or .jsonl")
    parser.add_argument("-m", "--model", required=True, help="folder or hub id of the model")
    parser.add_argument("--vocab", required=True, type=named_path, metavar="F", help="by `trimserve select`")
    parser.add_argument("--text-column", metavar="C", help="field of a .jsonl record that holds its text")
    grow = "write a vocab that their ids have joined, instead of failing"
    parser.add_argument("--grow", type=named_path, metavar="NEW", help=grow)
    _add_format(parser)


def _add_format(parser: argparse.ArgumentParser) -> None:
    # Declared by `main` on `finetune` itself; here too, so that it may stand behind the action.
    suppress: Any = argparse.SUPPRESS
    parser.add_argument("--format", choices=("human", "json"), default=suppress, help="output format")


def run(args: argparse.Namespace) -> int:
    """Run one of the commands."""
    return _restore(args) if args.action == "restore" else _check(args)


def _restore(args: argparse.Namespace) -> int:
    from trimserve.console import human_bytes
    from trimserve.finetune.restoring import restore

    made = restore(args.checkpoint, args.base, args.output)
    document = asdict(made) | {"path": str(made.path)}
    text = (
        f"{made.path}: {human_bytes(made.bytes_written)}; {made.kept:,} tuned rows of {made.vocab_size:,}, "
        f"the others from {made.base}"
    )
    emit(args, document, text)
    return 0


def _check(args: argparse.Namespace) -> int:
    from trimserve.files.artefact import check_output
    from trimserve.finetune.texts import find_outside, grow
    from trimserve.model.resolve import resolve_model
    from trimserve.vocab.file import load_vocab, save_vocab

    if args.grow is not None:
        check_output(args.grow, "vocab")
    vocab = load_vocab(args.vocab)
    source = resolve_model(args.model, weights=False)
    _check_tokenizer(source, vocab)
    origins: list[str] = []
    outside = find_outside(_encoded(args, source, origins), vocab)
    ids = sorted({int(id_) for text in outside for id_ in text.ids})
    if outside and args.grow is None:
        raise MismatchError(_complaint(outside, origins, ids, source))
    if args.grow is not None:
        vocab = grow(vocab, ids, multiple_of=_multiple_of(vocab), widths=sorted(source.linear_widths()))
        save_vocab(vocab, args.grow)
    document = {
        "texts": len(origins),
        "outside": len(outside),
        "ids": ids,
        "kept": len(vocab),
        "vocab_size": vocab.vocab_size,
    }
    emit(args, document, f"{len(origins):,} texts, {len(ids):,} ids outside the vocab; K = {len(vocab):,}")
    return 0


def _check_tokenizer(source: "ModelSource", vocab: "VocabMap") -> None:
    if vocab.tokenizer_sha256 and not source.has_tokenizer(vocab.tokenizer_sha256):
        raise MismatchError(
            f"the vocab was selected for the tokenizer {vocab.tokenizer_sha256[:12]}…, {source.name} has "
            f"{source.tokenizer_sha256[:12]}…: pass the model that was profiled."
        )


def _encoded(args: argparse.Namespace, source: "ModelSource", origins: list[str]) -> Iterator[Sequence[int]]:
    """The token ids of each text; where it stands is noted in `origins`."""
    tokenizer = source.tokenizer()
    lines = _lines(args)
    while batch := list(islice(lines, _BATCH_TEXTS)):
        origins += [origin for origin, _ in batch]
        for encoding in tokenizer.encode_batch_fast([text for _, text in batch]):
            yield encoding.ids


def _lines(args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Training texts: a record's text, or a line of a text file."""
    from trimserve.corpus.corpus import Corpus
    from trimserve.corpus.files import JSONL_SUFFIXES

    for path in args.corpus:
        records = Path(path).suffix.lower() in JSONL_SUFFIXES
        if records and args.text_column is None:
            raise UsageError(f"{path} holds records: name the field of their text with --text-column.")
        for document in Corpus([path], args.text_column if records else None).documents():
            if records:
                yield document.origin(), document.text
            else:
                yield from ((path, line) for line in document.text.splitlines())


def _complaint(
    outside: "Sequence[Outside]", origins: Sequence[str], ids: Sequence[int], source: "ModelSource"
) -> str:
    tokenizer = source.tokenizer()
    named = []
    for text in outside[:_SHOWN]:
        tokens = ", ".join(repr(tokenizer.id_to_token(int(id_))) for id_ in text.ids)
        named.append(f"text {text.index} ({origins[text.index]}): {tokens}")
    more = f" and {len(outside) - _SHOWN:,} more" if len(outside) > _SHOWN else ""
    return (
        f"{len(outside):,} of {len(origins):,} texts have {len(ids):,} ids outside the vocab: "
        f"{'; '.join(named)}{more}. Select a vocab that covers them, or let the ids join it with --grow NEW."
    )


def _multiple_of(vocab: "VocabMap") -> int:
    """What K was rounded to when the vocab was selected."""
    return int(vocab.rule.get("options", {}).get("multiple_of", 1))
