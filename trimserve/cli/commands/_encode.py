"""What `trimserve run` does with an encoder: embed, search, fill masks, classify."""

import argparse
import logging
import time
from typing import Any

from trimserve.cli.commands._sentence import Result, embed, given_prompts, rank, score, search
from trimserve.cli.output import emit
from trimserve.console import table
from trimserve.encoder.answers import Candidate
from trimserve.encoder.encoder import Encoder
from trimserve.errors import UsageError
from trimserve.folder.tasks import ANSWERING_TASK, EMBEDDING_TASK
from trimserve.text.codec import shorten

logger = logging.getLogger(__name__)
_TOP = 5


def encode(
    args: argparse.Namespace,
    model: Encoder,
    texts: list[str],
    options: dict[str, Any],
    corpus: list[str] | None,
) -> int:
    """Run the model's head on texts and print what it says.

    Args:
        args: the command line, for the output format.
        model: the encoder.
        texts: texts or queries.
        options: those of the command's options for encoders that were given.
        corpus: texts to search in.
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
    elif corpus is not None:
        document, lines = search(model, texts, corpus, top, prompts, batch_size)
    elif model.task == EMBEDDING_TASK or model.settings.is_sparse:
        document, lines = embed(model, texts, prompts, batch_size)
    else:
        document, lines = _of_task(model, texts, options, top, batch_size)
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


def _of_task(model: Encoder, texts: list[str], options: dict[str, Any], top: int, batch_size: int) -> Result:
    """What the folder's task says of each text, as the task's pipeline in transformers has it."""
    if model.task == "fill-mask":
        return _fill_mask(model, texts, top, options.get("targets"), batch_size)
    if model.task == "token-classification":
        return _tag(model, texts, options.get("aggregation"), batch_size)
    if model.task == ANSWERING_TASK:
        return _answer(model, texts, options.get("context"), options.get("top", 1), batch_size)
    return _classify(model, texts, options.get("top"), batch_size)


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
