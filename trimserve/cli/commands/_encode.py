"""What `trimserve run` does with an encoder: embed, search, fill masks, classify."""

import argparse
import logging
import time
from dataclasses import asdict
from typing import Any

from trimserve.arrays import Floats
from trimserve.cli.commands._sentence import Result, embed, given_prompts, rank, score, search
from trimserve.cli.inputs import read_texts
from trimserve.cli.output import emit
from trimserve.console import table
from trimserve.encoder.answers import label_scores
from trimserve.encoder.encoder import Encoder
from trimserve.errors import UsageError
from trimserve.folder.tasks import EMBEDDING_TASK
from trimserve.text.codec import shorten

logger = logging.getLogger(__name__)
_TOP = 5


def encode(args: argparse.Namespace, model: Encoder, texts: list[str], options: dict[str, Any]) -> int:
    """Run the model's head on texts and print what it says.

    Args:
        args: the command line, for the output format.
        model: the encoder.
        texts: texts or queries.
        options: those of the command's options for encoders that were given.
    """
    start = time.perf_counter()
    # Masks make K logits a token.
    batch_size = options.get("batch_size", 8 if model.task == "fill-mask" else 32)
    top = options.get("top", _TOP)
    if top < 1:
        raise UsageError(f"--top should be 1 or more, found {top}.")
    prompts = given_prompts(options)
    if "query" in options:
        most = options.get("top", len(texts))
        document, lines = rank(model, options["query"], texts, most, prompts, batch_size)
    elif "pairs" in options:
        document, lines = score(model, texts, prompts, batch_size)
    elif "corpus" in options:
        corpus = read_texts(options["corpus"], options.get("text_column"))
        document, lines = search(model, texts, corpus, top, prompts, batch_size)
    elif model.task == EMBEDDING_TASK or model.settings.is_sparse:
        document, lines = embed(model, texts, prompts, batch_size)
    elif prompts:
        raise UsageError(f"{model.folder.path} does {model.task}, which takes no prompt: leave it out.")
    elif model.task == "fill-mask":
        document, lines = _fill_mask(model, texts, top, batch_size)
    elif model.task == "token-classification":
        document, lines = _tag(model, texts, batch_size)
    else:
        document, lines = _classify(model, texts, batch_size)
    stats = model.stats
    document |= {
        "task": model.task,
        "tokens": stats.tokens,
        "cold_tokens": stats.cold_tokens,
        "truncated": stats.truncated,
        "seconds": round(time.perf_counter() - start, 6),
    }
    emit(args, document, "\n".join(lines))
    if stats.truncated:
        logger.warning("texts cut to the model's %s tokens: %d", model.max_tokens, stats.truncated)
    return 0


def _fill_mask(model: Encoder, texts: list[str], top: int, batch_size: int) -> Result:
    filled = model.fill_mask(texts, top_k=top, batch_size=batch_size)
    lines = [
        table(
            (shorten(text), "token id", "probability"),
            [(repr(c.token), c.id, f"{c.probability:.4f}") for c in mask],
        )
        for text, masks in zip(texts, filled, strict=True)
        for mask in masks
    ]
    without = [shorten(text) for text, masks in zip(texts, filled, strict=True) if not masks]
    if without:
        mask = model.codec.tokenizer.id_to_token(model.codec.mask_id)
        raise UsageError(f"text {without[0]} has no mask: write {mask} where a token is to be found.")
    predictions = [[[asdict(candidate) for candidate in mask] for mask in masks] for masks in filled]
    return {"masks": predictions}, ["\n\n".join(lines)]


def _classify(model: Encoder, texts: list[str], batch_size: int) -> Result:
    config = model.folder.read_json("config.json")
    scores = [label_scores(logits, config) for logits in model.forward(texts, batch_size=batch_size)]
    labels = [
        {"label": next(iter(found)), "probability": max(found.values()), "scores": found} for found in scores
    ]
    rows = [
        (shorten(text), label["label"], f"{label['probability']:.4f}")
        for text, label in zip(texts, labels, strict=True)
    ]
    return {"labels": labels}, [table(("text", "label", "probability"), rows)]


def _tag(model: Encoder, texts: list[str], batch_size: int) -> Result:
    config = model.folder.read_json("config.json")
    logits = model.forward(texts, batch_size=batch_size)
    pairs = zip(model.token_ids(texts), logits, strict=True)
    tagged = [
        [_tagged(model, id_, row, config) for id_, row in zip(ids.tolist(), rows, strict=True)]
        for ids, rows in pairs
    ]
    lines = [
        table(
            (shorten(text), "label", "probability"),
            [(t["token"], t["label"], f"{t['probability']:.4f}") for t in tags],
        )
        for text, tags in zip(texts, tagged, strict=True)
    ]
    return {"labels": tagged}, ["\n\n".join(lines)]


def _tagged(model: Encoder, id_: int, logits: Floats, config: dict[str, Any]) -> dict[str, Any]:
    label, probability = next(iter(label_scores(logits, config).items()))
    return {
        "token": model.codec.tokenizer.id_to_token(id_),
        "id": id_,
        "label": label,
        "probability": probability,
    }
