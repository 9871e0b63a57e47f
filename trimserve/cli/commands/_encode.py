"""What `trimserve run` does with an encoder: embed, search, fill masks, classify."""

import argparse
import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from trimserve.arrays import Floats
from trimserve.cli.inputs import read_texts
from trimserve.cli.output import emit
from trimserve.console import progress, table
from trimserve.encoder.answers import Candidate
from trimserve.encoder.encoder import Encoder
from trimserve.encoder.pooling import normalize_rows
from trimserve.errors import UsageError
from trimserve.folder.tasks import ANSWERING_TASK, EMBEDDING_TASK
from trimserve.text.codec import shorten

logger = logging.getLogger(__name__)
_TOP = 5
_SHOWN_NUMBERS = 4
_SHOWN_CHARACTERS = 88
_PART = 1024  # texts of a corpus embedded between two steps of the progress bar
# Options that one task alone has.
_OF_TASK = {"targets": "fill-mask", "aggregation": "token-classification", "context": ANSWERING_TASK}
# A result: what goes into the JSON document, and the lines for people.
Result = tuple[dict[str, Any], list[str]]


def encode(args: argparse.Namespace, model: Encoder, texts: list[str], options: dict[str, Any]) -> int:
    """Run the model's head on texts and print what it says.

    Args:
        args: the command line, for the output format.
        model: the encoder.
        texts: texts or queries.
        options: those of corpus, text_column, top, batch_size, targets, aggregation, context that were given.
    """
    _check_options(model, options)
    start = time.perf_counter()
    # Masks make K logits a token.
    batch_size = options.get("batch_size", 8 if model.task == "fill-mask" else 32)
    top = options.get("top", _TOP)
    if top < 1:
        raise UsageError(f"--top should be 1 or more, found {top}.")
    if "corpus" in options:
        corpus = read_texts(options["corpus"], options.get("text_column"))
        document, lines = _search(model, texts, corpus, top, batch_size)
    elif model.task == EMBEDDING_TASK:
        document, lines = _embed(model, texts, batch_size)
    elif model.task == "fill-mask":
        document, lines = _fill_mask(model, texts, top, options.get("targets"), batch_size)
    elif model.task == "token-classification":
        document, lines = _tag(model, texts, options.get("aggregation"), batch_size)
    elif model.task == ANSWERING_TASK:
        document, lines = _answer(model, texts, options.get("context"), options.get("top", 1), batch_size)
    else:
        document, lines = _classify(model, texts, options.get("top"), batch_size)
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


def _check_options(model: Encoder, options: dict[str, Any]) -> None:
    """Refuse options that the folder's task would ignore."""
    for name, task in _OF_TASK.items():
        if name in options and model.task != task:
            raise UsageError(f"{model.folder.path} does {model.task}: --{name} is for {task}, leave it out.")


def _embed(model: Encoder, texts: list[str], batch_size: int) -> Result:
    embeddings = model.encode(texts, batch_size=batch_size)
    norms = np.linalg.norm(embeddings, axis=1)
    rows = [
        (
            shorten(text),
            embeddings.shape[1],
            f"{norm:.4f}",
            ", ".join(f"{number:.4f}" for number in vector[:_SHOWN_NUMBERS]) + ", …",
        )
        for text, vector, norm in zip(texts, embeddings, norms, strict=True)
    ]
    return {"embeddings": embeddings.tolist()}, [table(("text", "numbers", "norm", "embedding"), rows)]


def _search(model: Encoder, queries: list[str], corpus: Sequence[str], top: int, batch_size: int) -> Result:
    if model.task != EMBEDDING_TASK:
        raise UsageError(
            f"{model.folder.path} does {model.task}: --corpus takes a feature-extraction folder."
        )
    found = normalize_rows(_embed_corpus(model, corpus, batch_size))
    cosines = normalize_rows(model.encode(queries, batch_size=batch_size)) @ found.T
    best = np.argsort(-cosines, axis=1, kind="stable")[:, :top]
    hits = [
        [{"text": corpus[i], "index": i, "cosine": float(row[i])} for i in indices.tolist()]
        for row, indices in zip(cosines, best, strict=True)
    ]
    tables = [
        table(
            (_one_line(query), "cosine"), [(_one_line(hit["text"]), f"{hit['cosine']:.3f}") for hit in found]
        )
        for query, found in zip(queries, hits, strict=True)
    ]
    return {"queries": queries, "hits": hits, "corpus_texts": len(corpus)}, ["\n\n".join(tables)]


def _embed_corpus(model: Encoder, corpus: Sequence[str], batch_size: int) -> Floats:
    parts = []
    with progress(len(corpus), "embedding the corpus", "text") as bar:
        for start in range(0, len(corpus), _PART):
            parts.append(model.encode(corpus[start : start + _PART], batch_size=batch_size))
            bar.update(len(parts[-1]))
    return np.concatenate(parts)


def _fill_mask(
    model: Encoder, texts: list[str], top: int, targets: list[str] | None, batch_size: int
) -> Result:
    filled = model.fill_mask(texts, top_k=top, targets=targets, batch_size=batch_size)
    lines = [
        table(
            (shorten(text), "token id", "score"),
            [(repr(c.token), c.id, f"{c.probability:.4f}") for c in mask],
        )
        for text, masks in zip(texts, filled, strict=True)
        for mask in masks
    ]
    without = [shorten(text) for text, masks in zip(texts, filled, strict=True) if not masks]
    if without:
        mask = model.codec.tokenizer.id_to_token(model.codec.mask_id)
        raise UsageError(f"text {without[0]} has no mask: write {mask} where a token is to be found.")
    predictions = [[[_proposed(found) for found in mask] for mask in masks] for masks in filled]
    return {"masks": predictions}, ["\n\n".join(lines)]


def _proposed(found: Candidate) -> dict[str, Any]:
    return {
        "score": found.probability,
        "token": found.id,
        "token_str": found.token,
        "sequence": found.sequence,
    }


def _classify(model: Encoder, texts: list[str], top: int | None, batch_size: int) -> Result:
    labels = model.classify(texts, top_k=top, batch_size=batch_size)
    rows = [
        (shorten(text) if place == 0 else "", label["label"], f"{label['score']:.4f}")
        for text, found in zip(texts, labels, strict=True)
        for place, label in enumerate(found if top else found[:1])
    ]
    return {"labels": labels}, [table(("text", "label", "score"), rows)]


def _tag(model: Encoder, texts: list[str], aggregation: str | None, batch_size: int) -> Result:
    how: Any = aggregation or "none"
    entities = model.tag(texts, aggregation=how, batch_size=batch_size)
    key = "entity" if how == "none" else "entity_group"
    lines = [
        table(
            (shorten(text), "label", "score", "characters"),
            [(e["word"], e[key], f"{e['score']:.4f}", f"{e['start']}-{e['end']}") for e in found],
        )
        for text, found in zip(texts, entities, strict=True)
    ]
    return {"entities": entities}, ["\n\n".join(lines)]


def _answer(model: Encoder, questions: list[str], context: str | None, top: int, batch_size: int) -> Result:
    if context is None:
        raise UsageError(f"{model.folder.path} answers questions: name the text to read with --context.")
    answers = [model.answer(question, context, top_k=top, batch_size=batch_size) for question in questions]
    lines = [
        table(
            (shorten(question), "score", "characters"),
            [
                (found["answer"], f"{found['score']:.4f}", f"{found['start']}-{found['end']}")
                for found in given
            ],
        )
        for question, given in zip(questions, answers, strict=True)
    ]
    return {"answers": answers}, ["\n\n".join(lines)]


def _one_line(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _SHOWN_CHARACTERS else flat[: _SHOWN_CHARACTERS - 1] + "…"
