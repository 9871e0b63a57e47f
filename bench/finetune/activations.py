"""What autograd keeps between forward and backward with each way to save memory, on real shapes.

Bytes are counted with `torch.autograd.graph.saved_tensors_hooks`, each storage once and without the weights,
so that they are the same on any machine however busy it is. Beside them stand the bytes of weights, gradients
and Adam's moments, which `partial_vocab` cuts. Weights are random.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from bench import harness
from bench.finetune.run import SHAPES, Shape, make_batch, select_ids
from examples.finetune_small import METHODS
from trimserve.vocab.map import Reason, VocabMap

VOCABS = ("full", "partial")
ACTIVATION_SHAPES = {
    "XLM-R-base": SHAPES["XLM-R-base"],
    "BERT-large": Shape(
        "bert",
        "AutoModelForSequenceClassification",
        "bert-uncased",
        {"vocab_size": 30_522, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
        | {"intermediate_size": 4096},
    ),
    "OPT-125m": Shape(
        "opt",
        "AutoModelForCausalLM",
        "gpt2",
        {"vocab_size": 50_272, "hidden_size": 768, "num_hidden_layers": 12, "ffn_dim": 3072}
        | {"num_attention_heads": 12},
        "token",
    ),
    "Llama, 30 layers": Shape(
        "llama",
        "AutoModelForCausalLM",
        "gpt2",
        {"vocab_size": 50_257, "hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536}
        | {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
        "token",
    ),
}
_TEXTS, _TOKENS = 2, 128  # GLUE's usual length
WEIGHT_BYTES, TRAINED_BYTES = 4, 12  # a weight; its gradient and Adam's two moments
# MEFT: saved activations at most this part of full fine-tuning's; WTA-CRS 0.3: that part (the papers').
PAPERS = {"MEFT": 1 - 0.84, "WTA-CRS": 1 / 2.7}


def vocab_of(shape: Shape) -> VocabMap:
    """The ids of banking77's training texts that the shape has rows for."""
    found = select_ids(shape, harness.data_folder() / "corpora" / "banking77-en")
    kept = found.kept_ids[found.kept_ids < shape.config["vocab_size"]]
    return VocabMap(kept, np.full(len(kept), Reason.PROFILE, np.uint8), shape.config["vocab_size"])


def worker(name: str) -> dict[str, Any]:
    """Count the saved bytes of every method for a shape."""
    import torch
    import transformers

    from examples.finetune_methods import METHODS as WAYS
    from examples.finetune_methods import SavedBytes
    from trimserve.finetune import partial_vocab

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    shape = ACTIVATION_SHAPES[name]
    vocab = vocab_of(shape)
    model = _build(shape)
    counted: dict[str, dict[str, Any]] = {vocab_name: {} for vocab_name in VOCABS}
    for vocab_name in VOCABS:
        cut = partial_vocab(model, vocab) if vocab_name == "partial" else contextlib.nullcontext()
        with cut as compact:
            batch = make_batch(shape, vocab, _TEXTS, _TOKENS)
            batch = batch if compact is None else compact.remap(batch)
            for method, how in WAYS.items():
                with how.apply(model):
                    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
                    weights = sum(p.numel() for p in model.parameters())
                    with SavedBytes(model) as saved:
                        loss = model(**batch).loss
                    del loss
                counted[vocab_name][method] = {
                    "saved": saved.count,
                    "trained": trained,
                    "state": WEIGHT_BYTES * weights + TRAINED_BYTES * trained,
                }
                model.requires_grad_(True)
    return {
        "model": name,
        "layers": shape.config.get("num_hidden_layers", 12),
        "vocab_size": vocab.vocab_size,
        "kept": len(vocab),
        "texts": batch["input_ids"].shape[0],
        "tokens": batch["input_ids"].shape[1],
        "methods": counted,
    }


def _build(shape: Shape) -> Any:  # noqa: ANN401 - a model of any class
    """The model, in training mode; its weights are drawn at once, which the libraries' own way is slow at."""
    import torch
    import transformers
    from transformers.initialization import no_init_weights

    config = transformers.AutoConfig.for_model(shape.model_type, **shape.config)
    with no_init_weights():
        model = getattr(transformers, shape.auto_class).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return model.train()


def lines(row: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A shape's methods as lines of a table under `HEADER`."""
    full = row["methods"]["full"]["full"]
    made = []
    for method in METHODS:
        whole, partial = (row["methods"][name][method] for name in VOCABS)
        made.append(
            (
                row["model"],
                method,
                _megabytes(whole["saved"]),
                f"{whole['saved'] / full['saved']:.2f}",
                _megabytes(partial["saved"]),
                f"{partial['saved'] / full['saved']:.2f}",
                *(_megabytes(one["state"]) for one in (whole, partial)),
            )
        )
    return made


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.0f}"


HEADER = (
    "shape",
    "method",
    "activations, MB",
    "of full",
    "partial_vocab, MB",
    "of full",
    "weights and Adam, MB",
    "partial_vocab, MB",
)


def main() -> int:
    """Measure each shape in a process of its own, save a row each, print the table."""
    from trimserve.console import table

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=ACTIVATION_SHAPES, nargs="+", default=list(ACTIVATION_SHAPES))
    parser.add_argument("--quick", action="store_true", help="result in build/bench only")
    parser.add_argument("--worker", choices=ACTIVATION_SHAPES, help="one shape in this process")
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args.worker)))
        return 0
    rows = []
    for name in args.only:
        row = harness.fresh_process(["-m", "bench.finetune.activations", "--worker", name])
        harness.save_row("finetune_activations", row, quick=args.quick)
        rows.append(row)
    print(table(HEADER, [line for row in rows for line in lines(row)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
