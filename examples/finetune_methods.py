"""The ways to train of examples/finetune_small.py, and a training run of one of them in this process."""

import contextlib
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

from examples.finetune_banking import forget_peak, minilm, peak_bytes, read_csv
from trimserve.finetune import Reversible, cut_vocab, load_reversible, reversible, sampled_gradients
from trimserve.vocab.file import load_vocab

BATCH, HEAD_RATE, SHARPNESS = 16, 5e-3, 16.0
_POOL = 20  # batches are made of texts of like length, out of so many batches


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
    "full": Method(2e-4, full),
    "LoRA": Method(2e-3, lora),
    "checkpointing": Method(2e-4, checkpointing),
    "MEFT 1": Method(2e-3, lambda model: reversible(model, variant=1)),
    "MEFT 2": Method(2e-3, lambda model: reversible(model, variant=2)),
    "MEFT 3": Method(2e-3, lambda model: reversible(model, variant=3)),
    "WTA-CRS 0.3": Method(2e-4, lambda model: sampled_gradients(model, keep=0.3)),
    "WTA-CRS 0.1": Method(2e-4, lambda model: sampled_gradients(model, keep=0.1)),
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
    """Train one method in this process and classify the test texts with the full vocab.

    Args:
        name: a key of `METHODS`; anything else is full fine-tuning with all rows of the vocab.
        data: folder of train.csv and test.csv.
        vocab: the file of kept ids.
        texts: how many to train on.
        tests: how many to classify; None: all.
        seed: of the order, the new head, the adapters and dropout.
    """
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
    method = METHODS.get(name, METHODS["full"])
    compact = cut_vocab(model, load_vocab(vocab)) if name in METHODS else None
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
    facts = {
        "method": name,
        "rate": method.rate,
        "seed": seed,
        "trained": trained,
        "saved": saved_bytes,
        "peak": peak,
    }
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
