"""Williams and Aletras: how many vocab rows and parameters a data set lets go, and what their rule misses.

Williams and Aletras (arXiv 2309.08708) keep every token id that occurs in the data set, its test split too,
and have no row for any other. `transformer-smaller-training-vocab` replicated that rule; its published
figures stand beside ours for the data sets of GLUE that `--glue DIR` holds (the archives' own .tsv files).
Without them the rule runs on the corpora at hand, of which every tenth line is held back.

Beside it stands our rule: structural ids and what covers 99.9 % of the tokens; the rest are cold rows. For
both, the share of held-out tokens that have no row in the graph: the paper's code fails on them, ours reads a
file. Tokenizers that are not at hand are replaced by the nearest one, and the row says so.
"""

import csv
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import harness
from trimserve.console import table
from trimserve.profiles.profile import Profile
from trimserve.profiles.profiling import profile
from trimserve.selection.select_ids import select

COVERAGE = 0.999
HELD_OUT = 10  # every so many lines one
_CHARACTERS = 4 << 20


@dataclass(frozen=True, slots=True)
class Model:
    """A model of the paper.

    Attributes:
        vocab_size: V of the published model.
        width: H.
        parameters: of the whole model without a task's head.
        stand_in: tokenizer that is taken where the model's own is not at hand, and why it is near.
    """

    vocab_size: int
    width: int
    parameters: int
    stand_in: tuple[str, str] | None = None


MODELS = {
    "bert-base-cased": Model(
        28_996, 768, 108_310_272, ("bert-uncased", "WordPiece, 30,522 rows, lower case")
    ),
    "roberta-base": Model(50_265, 768, 124_645_632, ("gpt2", "the same merges, 50,257 rows")),
    "xlm-roberta-base": Model(250_002, 768, 278_043_648, ("xlm-roberta", "its own")),
}
_OWN = "its own"
# helpmefindaname/transformer-smaller-training-vocab, README: vocab rows removed %, parameters removed %.
PUBLISHED: dict[str, dict[str, tuple[float, float]]] = {
    "CoLA": {
        "bert-base-cased": (77.67, 15.97),
        "roberta-base": (86.08, 26.66),
        "xlm-roberta-base": (97.79, 67.52),
    },
    "MNLI": {
        "bert-base-cased": (10.94, 2.25),
        "roberta-base": (14.78, 4.58),
        "xlm-roberta-base": (88.83, 61.34),
    },
    "MRPC": {
        "bert-base-cased": (49.93, 10.27),
        "roberta-base": (64.02, 19.83),
        "xlm-roberta-base": (94.88, 65.52),
    },
    "QNLI": {
        "bert-base-cased": (8.62, 1.77),
        "roberta-base": (17.64, 5.46),
        "xlm-roberta-base": (87.57, 60.47),
    },
    "QQP": {
        "bert-base-cased": (7.69, 1.58),
        "roberta-base": (5.91, 1.83),
        "xlm-roberta-base": (85.40, 58.98),
    },
    "RTE": {
        "bert-base-cased": (34.68, 7.13),
        "roberta-base": (50.49, 15.64),
        "xlm-roberta-base": (93.10, 64.29),
    },
    "SST-2": {
        "bert-base-cased": (62.39, 12.83),
        "roberta-base": (68.60, 21.25),
        "xlm-roberta-base": (96.25, 66.47),
    },
    "STS-B": {
        "bert-base-cased": (51.35, 10.56),
        "roberta-base": (64.37, 19.93),
        "xlm-roberta-base": (94.88, 65.52),
    },
    "WNLI": {
        "bert-base-cased": (93.66, 19.26),
        "roberta-base": (96.03, 29.74),
        "xlm-roberta-base": (99.25, 68.54),
    },
}
# The columns of GLUE's .tsv files that hold text; CoLA's has no header and its text in the last column.
_COLUMNS = {
    "MNLI": ("sentence1", "sentence2"),
    "MRPC": ("#1 String", "#2 String"),
    "QNLI": ("question", "sentence"),
    "QQP": ("question1", "question2"),
    "RTE": ("sentence1", "sentence2"),
    "SST-2": ("sentence",),
    "STS-B": ("sentence1", "sentence2"),
    "WNLI": ("sentence1", "sentence2"),
}


def glue_texts(folder: Path, name: str) -> tuple[list[str], list[str]]:
    """Texts of a GLUE task's training split, and those of its other splits.

    Raises:
        SystemExit: a file lacks the task's columns.
    """
    training: list[str] = []
    others: list[str] = []
    for path in sorted((folder / name).glob("*.tsv")):
        (training if path.stem == "train" else others).extend(_read_tsv(path, name))
    return training, others


def _read_tsv(path: Path, name: str) -> Iterator[str]:
    with path.open(encoding="utf-8", newline="") as file:
        lines = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        if name == "CoLA" and path.stem != "test":
            yield from (line[-1] for line in lines)
            return
        header = next(lines)
        wanted = _COLUMNS.get(name, ("sentence",))
        if missing := set(wanted) - set(header):
            raise SystemExit(f"{path} has no column {', '.join(sorted(missing))}: is this GLUE's {name}?")
        places = [header.index(column) for column in wanted]
        for line in lines:
            yield from (line[place] for place in places if place < len(line))


def corpus_texts(folder: Path) -> tuple[list[str], list[str]]:
    """Lines of a corpus, every tenth one held back."""
    files = sorted(path for path in folder.glob("*.txt") if path.name != "SOURCE.txt")
    text = "\n".join(path.read_text("utf-8") for path in files)[:_CHARACTERS]
    lines = [line for line in text.split("\n") if line.strip()]
    held_out = lines[HELD_OUT - 1 :: HELD_OUT]
    return [line for number, line in enumerate(lines, 1) if number % HELD_OUT], held_out


def count(tokenizer: Path, vocab_size: int, texts: list[str], work: Path) -> Profile:
    """Profile texts, a document each, with a bare tokenizer."""
    shutil.copyfile(tokenizer / "tokenizer.json", work / "tokenizer.json")
    (work / "config.json").write_text(json.dumps({"vocab_size": vocab_size}), "utf-8")
    corpus = work / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return profile([corpus], work, text_column="text", progress=False)


def measure(name: str, tokenizer: str, folder: Path, texts: tuple[list[str], list[str]]) -> dict[str, Any]:
    """Both rules on one data set with one tokenizer."""
    model = MODELS[name]
    rows = _rows(folder)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        training, held_out = (count(folder, rows, part, work) for part in texts)
    seen = np.flatnonzero(training.counts)
    everywhere = np.union1d(seen, np.flatnonzero(held_out.counts))
    vocab = select(training, coverage=COVERAGE)
    return {
        "model": name,
        "tokenizer": tokenizer,
        "vocab_size": rows,
        "tokens": training.tokens,
        "held_out_tokens": held_out.tokens,
        "seen_once_all_splits": _removed(model, rows, everywhere.size),
        "seen_once": _removed(model, rows, seen.size) | {"held_out_missing": 1 - held_out.coverage(seen)},
        "coverage_rule": _removed(model, rows, len(vocab))
        | {"coverage": COVERAGE, "held_out_cold": 1 - held_out.coverage(vocab.kept_ids)},
    }


def _rows(tokenizer: Path) -> int:
    from tokenizers import Tokenizer

    size: int = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).get_vocab_size()
    return size


def _removed(model: Model, rows: int, kept: int) -> dict[str, float]:
    """Shares in percent, with the tokenizer's rows in the place of the model's own."""
    body = model.parameters - model.vocab_size * model.width
    removed = rows - kept
    return {
        "kept": kept,
        "rows_removed": 100 * removed / rows,
        "parameters_removed": 100 * removed * model.width / (body + rows * model.width),
    }


def tokenizer_of(name: str, folder: Path) -> tuple[str, str]:
    """Folder of a model's tokenizer, and what it is: its own, or a stand-in."""
    stand_in = MODELS[name].stand_in
    if (folder / name / "tokenizer.json").exists() or stand_in is None:
        return name, _OWN
    return stand_in


HEADER = (
    "data set",
    "model",
    "published rows %",
    "parameters %",
    "seen once: rows %",
    "parameters %",
    "held-out tokens without a row",
    "ours: rows %",
    "parameters %",
    "held-out tokens that are cold",
)


def line(row: Mapping[str, Any]) -> tuple[str, ...]:
    """One row for people, under `HEADER`."""
    published, once, ours = row["published"], row["seen_once"], row["coverage_rule"]
    figures = ("-", "-") if published is None else tuple(f"{value:.2f}" for value in published)
    shown = row["seen_once_all_splits"] if published else once
    return (
        row["data"],
        row["model"] + ("" if row["note"] == _OWN else f" ({row['tokenizer']})"),
        *figures,
        *(f"{shown[key]:.2f}" for key in ("rows_removed", "parameters_removed")),
        f"{once['held_out_missing']:.3%}",
        *(f"{ours[key]:.2f}" for key in ("rows_removed", "parameters_removed")),
        f"{ours['held_out_cold']:.3%}",
    )


def main() -> int:
    """Measure every model on every data set, save a row each, print one table."""
    parser = harness.parser(__doc__ or "", rounds=1)
    parser.add_argument(
        "--glue", type=Path, help="folder with CoLA/, RTE/, SST-2/ ..., each with its .tsv files"
    )
    parser.add_argument(
        "--tokenizers", type=Path, help="folder with a folder a tokenizer (default: the data's)"
    )
    parser.add_argument("--corpora", nargs="+", help="corpora of the data (default: all)")
    args = parser.parse_args()
    data = harness.data_folder()
    tokenizers = args.tokenizers or data / "tokenizers"
    sets: dict[str, tuple[list[str], list[str]]] = {}
    if args.glue:
        names = [name for name in PUBLISHED if (args.glue / name).is_dir()]
        if not names:
            parser.error(f"{args.glue} holds none of {', '.join(PUBLISHED)}")
        sets = {name: glue_texts(args.glue, name) for name in names}
    else:
        names = args.corpora or sorted(path.name for path in (data / "corpora").iterdir() if path.is_dir())
        sets = {name: corpus_texts(data / "corpora" / name) for name in names[: 1 if args.quick else None]}
    rows = []
    for data_name, texts in sets.items():
        for name in MODELS:
            tokenizer, note = tokenizer_of(name, tokenizers)
            measured = measure(name, tokenizer, tokenizers / tokenizer, texts)
            published = PUBLISHED.get(data_name, {}).get(name)
            rows.append({"data": data_name, "note": note, "published": published, **measured})
            print(f"{data_name}, {name}", file=sys.stderr)
    harness.save_row(
        "paper", {"rows": rows, "models": {k: asdict(v) for k, v in MODELS.items()}}, quick=args.quick
    )
    if not args.glue:
        print(
            "GLUE is not at hand (--glue DIR): the rule on other corpora, without published figures",
            file=sys.stderr,
        )
    harness.report(table(HEADER, map(line, rows)), {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
