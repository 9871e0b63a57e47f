"""Train all-MiniLM-L6-v2 on the 77 intents of banking77 with each way to save memory, and print the table.

Full fine-tuning, LoRA, gradient checkpointing, reversible layers (MEFT) and sampled gradients (WTA-CRS), all
with the kept rows alone, beside full fine-tuning with the whole vocab. Each is trained in a process of its
own on one thread; then the full vocab is back and the test texts are classified. Needs
`pip install 'trimserve[finetune,demo]' peft` and the data set's train.csv and test.csv
(github.com/PolyAI-LDN/task-specific-datasets).
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoTokenizer, BertModel, BertPreTrainedModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import trimserve
from examples.finetune_banking import forget_peak, minilm, peak_bytes, read_csv
from trimserve.console import human_bytes, table
from trimserve.finetune import Reversible, cut_vocab, load_reversible, reversible, sampled_gradients
from trimserve.vocab.file import load_vocab, save_vocab

BATCH, HEAD_RATE, SHARPNESS = 16, 5e-3, 16.0
_POOL = 20  # batches are made of texts of like length, out of so many batches
BASELINE = "full vocab"
HEADER = ("MiniLM on banking77", "trained", "saved activations", "peak memory", "CPU s a step", "accuracy")


class SentenceClassifier(BertPreTrainedModel):
    """A linear head on the mean of the token vectors, which is what MiniLM was trained to give."""

    def __init__(self, config: Any) -> None:  # noqa: ANN401
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = torch.nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor | None = None
    ) -> Any:  # noqa: ANN401
        """Logits (B, classes), and the loss where labels are given."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask[..., None].to(hidden.dtype)
        mean = (hidden * weights).sum(1) / weights.sum(1)
        logits = self.classifier(torch.nn.functional.normalize(mean, dim=-1)) * SHARPNESS
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return transformers.modeling_outputs.SequenceClassifierOutput(loss=loss, logits=logits)


@contextlib.contextmanager
def checkpointing(model: Any) -> Iterator[None]:  # noqa: ANN401
    """Each layer's activations are computed again in backward."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()


@contextlib.contextmanager
def lora(model: Any) -> Iterator[None]:  # noqa: ANN401
    """Low-rank updates of queries and values, and the new head; merged when the block ends."""
    import peft

    settings: Any = {"r": 8, "lora_alpha": 16, "target_modules": r".*\.(query|value|q_proj|v_proj)"}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    for name, module in model.named_children():
        if name == "classifier":
            module.requires_grad_(True)
    yield
    adapted.merge_and_unload()


@contextlib.contextmanager
def lora_and_sampled(model: Any) -> Iterator[None]:  # noqa: ANN401
    """Both."""
    with lora(model), sampled_gradients(model, keep=0.3):
        yield


def full(_: Any) -> AbstractContextManager[None]:  # noqa: ANN401
    """All weights."""
    return contextlib.nullcontext()


@dataclass(frozen=True, slots=True)
class Method:
    """A way to train.

    Attributes:
        rate: AdamW's for all but the new head, which learns at `HEAD_RATE`.
        apply: of a model, for a block.
    """

    rate: float
    apply: Callable[[Any], AbstractContextManager[Any]]


METHODS = {
    "full": Method(5e-4, full),
    "LoRA": Method(2e-3, lora),
    "checkpointing": Method(5e-4, checkpointing),
    "MEFT 1": Method(2e-3, lambda model: reversible(model, variant=1)),
    "MEFT 2": Method(2e-3, lambda model: reversible(model, variant=2)),
    "MEFT 3": Method(2e-3, lambda model: reversible(model, variant=3)),
    "WTA-CRS 0.3": Method(5e-4, lambda model: sampled_gradients(model, keep=0.3)),
    "WTA-CRS 0.1": Method(5e-4, lambda model: sampled_gradients(model, keep=0.1)),
    "LoRA, WTA-CRS 0.3": Method(2e-3, lora_and_sampled),
}


class SavedBytes:
    """Bytes that autograd keeps between forward and backward, each storage once, without the weights."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self._storages: dict[int, int] = {}
        self._kept: list[torch.Tensor] = []

    def __enter__(self) -> "SavedBytes":
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        self._kept.clear()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self._storages[storage.data_ptr()] = storage.nbytes()
            self._kept.append(tensor)  # so that its place is not used again
        return tensor

    @property
    def count(self) -> int:
        """The bytes so far."""
        return sum(self._storages.values())


def batches_of(tokenizer: Any, texts: Sequence[str], labels: Sequence[int], seed: int) -> list[Any]:  # noqa: ANN401
    """Batches of texts of like length, in random order."""
    random, pool = np.random.default_rng(seed), BATCH * _POOL
    made = []
    for begin in range(0, len(texts), pool):
        places = sorted(range(begin, min(begin + pool, len(texts))), key=lambda place: len(texts[place]))
        for start in range(0, len(places), BATCH):
            picked = places[start : start + BATCH]
            batch = inputs_of(tokenizer, [texts[place] for place in picked])
            made.append(batch | {"labels": torch.tensor([labels[place] for place in picked])})
    return [made[number] for number in random.permutation(len(made))]


def inputs_of(tokenizer: Any, texts: Sequence[str]) -> dict[str, Any]:  # noqa: ANN401
    """What the classifier takes of padded texts."""
    batch = tokenizer(list(texts), padding=True, return_tensors="pt")
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def optimizer_of(model: Any, rate: float) -> torch.optim.Optimizer:  # noqa: ANN401
    """AdamW on what is trained."""
    trained = [item for item in model.named_parameters() if item[1].requires_grad]
    head = [parameter for name, parameter in trained if name.startswith("classifier")]
    rest = [parameter for name, parameter in trained if not name.startswith("classifier")]
    groups: list[dict[str, Any]] = [{"params": rest, "lr": rate}, {"params": head, "lr": HEAD_RATE}]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)


def train(model: Any, batches: Iterable[Mapping[str, Any]], optimizer: Any, steps: int) -> dict[str, Any]:  # noqa: ANN401
    """Train; the losses, CPU seconds of each step, and the most that autograd kept between the passes."""
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    losses, seconds = [], []
    for batch in batches:
        begin = time.process_time()
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        seconds.append(time.process_time() - begin)
    return {"losses": losses, "seconds": seconds}


def run(name: str, data: Path, vocab: Path, texts: int, tests: int | None, seed: int) -> dict[str, Any]:
    """Train one method in this process and classify the test texts with the full vocab."""
    torch.set_num_threads(1)
    load: Any = AutoTokenizer.from_pretrained  # has no types
    tokenizer = load(minilm())
    named, labels = read_csv(data / "train.csv")
    intents = sorted(set(labels))
    order = np.random.default_rng(seed).permutation(len(named))[:texts]
    chosen, classes = [named[i] for i in order], [intents.index(labels[i]) for i in order]
    batches = batches_of(tokenizer, chosen, classes, seed)

    torch.manual_seed(seed)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    model: Any = SentenceClassifier.from_pretrained(minilm(), num_labels=len(intents)).train()
    method = METHODS["full" if name == BASELINE else name]
    compact = None if name == BASELINE else cut_vocab(model, load_vocab(vocab))
    with tempfile.TemporaryDirectory() as folder:
        with method.apply(model) as applied:
            forget_peak()
            optimizer = optimizer_of(model, method.rate)
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            compacted = batches if compact is None else [compact.remap(batch) for batch in batches]
            made = train(model, compacted, optimizer, len(batches))
            peak = peak_bytes()
            longest = max(compacted, key=lambda batch: batch["input_ids"].numel())
            with SavedBytes(model) as saved:
                loss = model(**longest).loss
            saved_bytes = saved.count
            del loss
            if isinstance(applied, Reversible):
                applied.save(Path(folder))
        if compact is not None:
            compact.restore()
        if isinstance(applied, Reversible):
            load_reversible(model, Path(folder))
        test_texts, test_labels = (column[:tests] for column in read_csv(data / "test.csv"))
        predicted = classify(model.eval(), tokenizer, test_texts)
    right = predicted == np.array([intents.index(label) for label in test_labels])
    facts = {"method": name, "seed": seed, "trained": trained, "saved": saved_bytes, "peak": peak}
    return facts | {"tests": len(right), "accuracy": float(right.mean())} | made


def classify(model: Any, tokenizer: Any, texts: Sequence[str]) -> "np.ndarray[Any, Any]":  # noqa: ANN401
    """The class of each text."""
    order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
    found = np.empty(len(texts), np.int64)
    with torch.inference_mode():
        for start in range(0, len(order), 64):
            places = order[start : start + 64]
            batch = inputs_of(tokenizer, [texts[place] for place in places])
            found[places] = model(**batch).logits.argmax(-1).numpy()
    return found


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
            f"full, {name}" if name == BASELINE else name,
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
    parser.add_argument("--texts", type=int, default=1600, help=f"training texts, {BATCH} a step")
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
