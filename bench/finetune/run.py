"""Fine-tuning with the kept rows alone against the full model: peak memory and time of a step.

Models of real shapes with random weights take a few AdamW steps in fp32, each in a process of its own; their
vocabs are all ids that banking77's training texts have (coverage 1, the rule of Williams and Aletras, and the
structural ids), by the model's own tokenizer. mT5's is not at hand: XLM-R's stands in, also a Unigram of
250,000 pieces. Then examples/finetune_banking.py trains the real MiniLM on banking77, full and trimmed.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import harness
from examples.finetune_banking import BATCH, HEADER, forget_peak, lines, peak_bytes
from examples.finetune_banking import compare as compare_banking
from trimserve.console import human_bytes, table
from trimserve.vocab.map import Reason, VocabMap

VARIANTS = ("full", "partial")
# Adam holds a parameter, its gradient and two moments: four fp32 numbers.
BYTES_A_PARAMETER = 16
# Reductions of embedding parameters on GLUE that Williams & Aletras 2025 report (arXiv:2309.08708v2, as
# summarised on arxivlens.com; the paper's tables could not be had).
PAPER = {"BERT": 0.171, "XLM-V": 0.993}


@dataclass(frozen=True, slots=True)
class Shape:
    """A model to build.

    Attributes:
        model_type: transformers' name of the architecture.
        auto_class: the Auto class that builds it.
        tokenizer: folder of the tokenizer that its vocab is selected with.
        config: what differs from the architecture's defaults.
        labels: ``"class"`` or ``"token"``.
    """

    model_type: str
    auto_class: str
    tokenizer: str
    config: dict[str, Any]
    labels: str = "class"


SHAPES = {
    "BERT-base": Shape("bert", "AutoModelForSequenceClassification", "bert-uncased", {"vocab_size": 30_522}),
    "XLM-R-base": Shape(
        "xlm-roberta",
        "AutoModelForSequenceClassification",
        "xlm-roberta",
        {"vocab_size": 250_002, "max_position_embeddings": 514, "type_vocab_size": 1},
    ),
    "mT5-small": Shape(
        "mt5",
        "AutoModelForSeq2SeqLM",
        "xlm-roberta",
        {"vocab_size": 250_112, "d_model": 512, "d_ff": 1024, "num_layers": 8, "num_heads": 6}
        | {"num_decoder_layers": 8, "decoder_start_token_id": 0, "tie_word_embeddings": False},
        "token",
    ),
    "Qwen3-0.6B": Shape(
        "qwen3",
        "AutoModelForCausalLM",
        "qwen2",
        {"vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
        | {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
        "token",
    ),
}
QUICK_SHAPES = ("BERT-base",)
_TEXTS, _LENGTH = 4, 64


def select_ids(shape: Shape, corpus: Path) -> VocabMap:
    """The vocab of a shape: every id of banking77's training texts, and the structural ids."""
    import trimserve
    from examples.finetune_banking import read_csv

    folder = harness.data_folder() / "tokenizers" / shape.tokenizer
    profile = trimserve.profile([], folder, texts=read_csv(corpus / "train.csv")[0], progress=False)
    kept = trimserve.select(profile, coverage=1.0).kept_ids
    return VocabMap(kept, np.full(len(kept), Reason.PROFILE, np.uint8), shape.config["vocab_size"])


def build(shape: Shape) -> Any:  # noqa: ANN401 - a model of any class
    """The model with random weights, in training mode."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(shape.model_type, **shape.config)
    return getattr(transformers, shape.auto_class).from_config(config).train()


def make_batch(shape: Shape, vocab: VocabMap, texts: int = _TEXTS, tokens: int = _LENGTH) -> dict[str, Any]:
    """Random kept ids, by default four texts of 64 tokens."""
    import torch

    random = np.random.default_rng(0)
    ids = torch.from_numpy(random.choice(vocab.kept_ids, (texts, tokens)).astype(np.int64))
    labels = ids.clone() if shape.labels == "token" else torch.zeros(texts, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def worker(name: str, variant: str, ids: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Train one variant of a shape in this process."""
    import torch

    from trimserve.finetune import partial_vocab

    torch.set_num_threads(args.threads)
    shape = SHAPES[name]
    kept = np.load(ids)
    vocab = VocabMap(kept, np.full(len(kept), Reason.PROFILE, np.uint8), shape.config["vocab_size"])
    model = build(shape)
    batch = make_batch(shape, vocab)
    # The rows come back in memory when a block ends; a program that saves compact checkpoints has no need
    # of that, so what is measured ends before it.
    cut = partial_vocab(model, vocab) if variant == "partial" else contextlib.nullcontext()
    with cut as compact:
        forget_peak()
        before = harness.memory().resident
        batch = batch if compact is None else compact.remap(batch)
        seconds = _train(model, batch, args.steps)
        peak = peak_bytes()
        parameters = sum(parameter.numel() for parameter in model.parameters())
        parts = [model.get_input_embeddings(), model.get_output_embeddings()]
        matrices = {id(part.weight): part.weight.numel() for part in parts if part is not None}
    return {
        "seconds": seconds,
        "peak": peak,
        "resident_before": before,
        "parameters": parameters,
        "vocab_parameters": sum(matrices.values()),
    }


def _train(model: Any, batch: Mapping[str, Any], steps: int) -> list[float]:  # noqa: ANN401
    """Seconds of each step after the first, which makes Adam's moments."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0)
    seconds = []
    for _ in range(steps + 1):
        begin = time.perf_counter()
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure both variants of a shape in turn."""
    shape = SHAPES[name]
    vocab = select_ids(shape, harness.data_folder() / "corpora" / "banking77-en")
    with tempfile.TemporaryDirectory() as scratch:
        ids = Path(scratch) / "kept.npy"
        np.save(ids, vocab.kept_ids)
        common = ["--ids", str(ids), "--threads", str(args.threads), "--steps", str(args.steps)]
        commands = {
            variant: ["-m", "bench.finetune.run", "--worker", name, "--variant", variant, *common]
            for variant in VARIANTS
        }
        neighbours = harness.Neighbours()
        runs = harness.in_turn(commands, 1 if args.quick else args.rounds)
    row: dict[str, Any] = {
        "model": name,
        "tokenizer": shape.tokenizer,
        "vocab_size": vocab.vocab_size,
        "kept": len(vocab),
        "texts": _TEXTS,
        "tokens": _LENGTH,
        "threads": args.threads,
        "others_cpu_share": neighbours.share(),
        "paper": PAPER,
    }
    for variant in VARIANTS:
        made = runs[variant]
        row[variant] = {
            "parameters": made[0]["parameters"],
            "vocab_parameters": made[0]["vocab_parameters"],
            "counted_bytes": BYTES_A_PARAMETER * made[0]["parameters"],
            "peak": int(np.median([run["peak"] for run in made])),
            "seconds": asdict(harness.spread([value for run in made for value in run["seconds"]])),
            "seconds_samples": [run["seconds"] for run in made],
        }
    return row


def shape_line(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A shape as a line of a table under `SHAPES_HEADER`."""
    full, partial = (row[variant] for variant in VARIANTS)
    removed = 1 - partial["vocab_parameters"] / full["vocab_parameters"]
    return (
        row["model"],
        f"{row['vocab_size']:,}",
        f"{row['kept']:,}",
        f"{removed:.1%}",
        *(human_bytes(one["counted_bytes"]) for one in (full, partial)),
        *(human_bytes(one["peak"]) for one in (full, partial)),
        *(f"{one['seconds']['median']:.2f}" for one in (full, partial)),
    )


SHAPES_HEADER = (
    "model",
    "V",
    "K",
    "vocab parameters removed",
    "counted, full",
    "partial",
    "peak, full",
    "partial",
    "s a step, full",
    "partial",
)


def without_lists(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of the example less its raw losses and times."""
    return {
        key: without_lists(value) if isinstance(value, dict) else value
        for key, value in facts.items()
        if not isinstance(value, Sequence) or isinstance(value, str)
    }


def main() -> int:
    """Measure, save a row a shape and one of the example, print the tables."""
    parser = harness.parser(__doc__ or "", rounds=1)
    parser.add_argument("--only", choices=[*SHAPES, "banking"], nargs="+", help="some shapes, or the example")
    parser.add_argument("--steps", type=int, default=2, help="timed steps a process (default 2)")
    parser.add_argument("--texts", type=int, default=3200, help="training texts of the example")
    parser.add_argument("--worker", choices=SHAPES, help="one measurement in this process")
    parser.add_argument("--variant", choices=VARIANTS)
    parser.add_argument("--ids", type=Path)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args.worker, args.variant, args.ids, args)))
        return 0
    names = args.only or ((*QUICK_SHAPES, "banking") if args.quick else (*SHAPES, "banking"))
    rows = []
    for name in (name for name in names if name != "banking"):
        row = measure(name, args)
        harness.save_row("finetune", row, quick=args.quick)
        rows.append(harness.without_samples(row))
    print(table(SHAPES_HEADER, map(shape_line, rows)), file=sys.stderr)
    facts = None
    if "banking" in names:
        data = harness.data_folder() / "corpora" / "banking77-en"
        facts = compare_banking(data, 2 * BATCH if args.quick else args.texts, 128 if args.quick else None)
        harness.save_row("finetune_banking", facts, quick=args.quick)
        print(table(HEADER, lines(facts)), file=sys.stderr)
    harness.report("", {"rows": rows, "banking": None if facts is None else without_lists(facts)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
