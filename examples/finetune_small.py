"""Train all-MiniLM-L6-v2 on the 77 intents of banking77 with each way to save memory, and print the table.

Full fine-tuning, LoRA, gradient checkpointing, reversible layers (MEFT) and sampled gradients (WTA-CRS), all
with the kept rows alone, beside full fine-tuning with the whole vocab. Each is trained in a process of its
own on one thread; then the full vocab is back and the test texts are classified. Needs
`pip install 'trimserve[finetune,demo]' peft` and the data set's train.csv and test.csv
(github.com/PolyAI-LDN/task-specific-datasets).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import trimserve
from examples.finetune_banking import minilm, read_csv
from trimserve.console import human_bytes, table
from trimserve.vocab.file import save_vocab

BASELINE = "full vocab"
METHODS = (
    "full",
    "LoRA",
    "checkpointing",
    "MEFT 1",
    "MEFT 2",
    "MEFT 3",
    "WTA-CRS 0.3",
    "WTA-CRS 0.1",
    "LoRA, WTA-CRS 0.3",
)
HEADER = ("MiniLM on banking77", "trained", "saved activations", "peak memory", "CPU s a step", "accuracy")


def in_process(
    name: str, data: Path, vocab: Path, texts: int, tests: int | None, seed: int
) -> dict[str, Any]:
    """Run this file for one method in a fresh process."""
    words = ["--method", name, "--data", str(data), "--vocab", str(vocab)]
    words += ["--texts", str(texts), "--seeds", str(seed)]
    words += [] if tests is None else ["--tests", str(tests)]
    done = subprocess.run([sys.executable, __file__, *words], check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(
    data: Path, names: Sequence[str], texts: int, tests: int | None, seeds: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """The facts of each method and seed, as they come."""
    with tempfile.TemporaryDirectory() as scratch:
        vocab = Path(scratch) / "vocab_map.safetensors"
        # Coverage 1: every id of the training texts is kept. Test texts may hold any id.
        profile = trimserve.profile([], minilm(), texts=read_csv(data / "train.csv")[0], progress=False)
        save_vocab(trimserve.select(profile, coverage=1.0), vocab)
        for seed in seeds:
            for name in names:
                print(f"seed {seed}: {name}", file=sys.stderr, flush=True)
                yield in_process(name, data, vocab, texts, tests, seed)


def lines(runs: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """A line a method under `HEADER`."""
    for name in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == name]
        found = [100 * run["accuracy"] for run in own]
        spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
        yield (
            "full, all rows" if name == BASELINE else name,
            f"{own[0]['trained'] / 1e6:.2f} M",
            human_bytes(own[0]["saved"]),
            human_bytes(int(statistics.median(run["peak"] for run in own))),
            f"{statistics.median(value for run in own for value in run['seconds'][1:]):.2f}",
            f"{statistics.fmean(found):.1f}{spread}",
        )


def main() -> int:
    """Train each method and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of train.csv and test.csv")
    parser.add_argument("--texts", type=int, default=1600, help="training texts, 16 a step")
    parser.add_argument("--tests", type=int, help="test texts (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run for each (default: 0)")
    parser.add_argument("--methods", choices=[BASELINE, *METHODS], nargs="+", default=[BASELINE, *METHODS])
    parser.add_argument("--format", choices=("human", "json"), default="human")
    parser.add_argument("--method", choices=[BASELINE, *METHODS], help=argparse.SUPPRESS)
    parser.add_argument("--vocab", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not (args.data / "train.csv").is_file():
        parser.error(f"{args.data} has no train.csv: pass the folder of banking77 with --data")
    if args.method:
        from examples.finetune_methods import run

        print(json.dumps(run(args.method, args.data, args.vocab, args.texts, args.tests, args.seeds[0])))
        return 0
    runs = []
    for made in compare(args.data, args.methods, args.texts, args.tests, args.seeds):
        runs.append(made)
        if args.format == "json":
            print(json.dumps(made), flush=True)
    if args.format == "human":
        print(table(HEADER, lines(runs)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
