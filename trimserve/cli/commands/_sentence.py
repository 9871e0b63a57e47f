"""What `trimserve run` does with a sentence-transformers folder: embed, search, score pairs, rank."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

from trimserve.arrays import Floats
from trimserve.console import progress, table
from trimserve.encoder.encoder import Encoder
from trimserve.errors import MismatchError, UsageError
from trimserve.files.checked_json import parse_json
from trimserve.text.codec import shorten

_SHOWN_NUMBERS = 4
_SHOWN_TOKENS = 8
_SHOWN_CHARACTERS = 88
_PART = 1024  # texts of a corpus embedded between two steps of the progress bar
# A result: what goes into the JSON document, and the lines for people.
Result = tuple[dict[str, Any], list[str]]


class PromptOptions(TypedDict, total=False):
    """What of `--prompt-name` and `--prompt` was given."""

    prompt_name: str
    prompt: str


def given_prompts(options: Mapping[str, Any]) -> PromptOptions:
    """Those of the command's options that say which prompt to put before each text."""
    prompts: PromptOptions = {}
    if "prompt_name" in options:
        prompts["prompt_name"] = options["prompt_name"]
    if "prompt" in options:
        prompts["prompt"] = options["prompt"]
    return prompts


def embed(model: Encoder, texts: list[str], prompts: PromptOptions, batch_size: int) -> Result:
    """Embed texts; a sparse encoder's embeddings are token ids and weights."""
    if model.settings.is_sparse:
        return _embed_sparse(model, texts, prompts, batch_size)
    embeddings = model.encode(texts, batch_size=batch_size, **prompts)
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


def _embed_sparse(model: Encoder, texts: list[str], prompts: PromptOptions, batch_size: int) -> Result:
    vectors = model.encode_sparse(texts, batch_size=batch_size, **prompts)
    rows = []
    for text, vector in zip(texts, vectors, strict=True):
        best = np.argsort(-vector.weights, kind="stable")[:_SHOWN_TOKENS]
        named = (
            f"{model.codec.tokenizer.id_to_token(int(vector.ids[place]))} {vector.weights[place]:.3f}"
            for place in best
        )
        rows.append((shorten(text), len(vector.ids), ", ".join(named)))
    found = [{"ids": vector.ids.tolist(), "weights": vector.weights.tolist()} for vector in vectors]
    return {"sparse": found}, [table(("text", "tokens", "largest weights"), rows)]


def search(
    model: Encoder,
    queries: list[str],
    corpus: Sequence[str],
    top: int,
    prompts: PromptOptions,
    batch_size: int,
) -> Result:
    """Find the texts of a corpus that are most like each query, by the folder's similarity.

    Queries get the prompt that was asked for, else the folder's for queries; the corpus gets the one for
    documents, as in sentence-transformers' `encode_query` and `encode_document`.
    """
    found = _embed_corpus(model, corpus, batch_size)
    if prompts:
        embedded = model.encode(queries, batch_size=batch_size, **prompts)
    else:
        embedded = model.encode_query(queries, batch_size=batch_size)
    likeness = model.similarity(embedded, found)
    name = model.settings.similarity
    best = np.argsort(-likeness, axis=1, kind="stable")[:, :top]
    hits = [
        [{"text": corpus[i], "index": i, name: float(row[i])} for i in indices.tolist()]
        for row, indices in zip(likeness, best, strict=True)
    ]
    tables = [
        table((_one_line(query), name), [(_one_line(hit["text"]), f"{hit[name]:.3f}") for hit in found])
        for query, found in zip(queries, hits, strict=True)
    ]
    document = {"queries": queries, "hits": hits, "similarity": name, "corpus_texts": len(corpus)}
    return document, ["\n\n".join(tables)]


def _embed_corpus(model: Encoder, corpus: Sequence[str], batch_size: int) -> Floats:
    parts = []
    with progress(len(corpus), "embedding the corpus", "text") as bar:
        for start in range(0, len(corpus), _PART):
            parts.append(model.encode_document(corpus[start : start + _PART], batch_size=batch_size))
            bar.update(len(parts[-1]))
    return np.concatenate(parts)


def score(model: Encoder, lines: list[str], prompts: PromptOptions, batch_size: int) -> Result:
    """Score pairs of texts, one a line."""
    pairs = [read_pair(line) for line in lines]
    scores = model.predict(pairs, batch_size=batch_size, **prompts)
    rows = [
        (shorten(first), shorten(second), ", ".join(f"{value:.4f}" for value in np.atleast_1d(found)))
        for (first, second), found in zip(pairs, scores, strict=True)
    ]
    document = {"pairs": [list(pair) for pair in pairs], "scores": scores.tolist()}
    return document, [table(("first", "second", "score"), rows)]


def rank(
    model: Encoder, query: str, documents: list[str], top: int, prompts: PromptOptions, batch_size: int
) -> Result:
    """Sort texts by their score with a query, the best first."""
    ranking = model.rank(query, documents, top_k=top, return_documents=True, batch_size=batch_size, **prompts)
    rows = [(_one_line(entry["text"]), f"{entry['score']:.4f}") for entry in ranking]
    return {"query": query, "ranking": ranking}, [table((_one_line(query), "score"), rows)]


def read_pair(line: str) -> tuple[str, str]:
    """Read a JSON list of two texts, or two texts with a TAB between them.

    Raises:
        UsageError: the line is neither.
    """
    if line.lstrip().startswith("["):
        pair = None
        with contextlib.suppress(MismatchError):
            pair = parse_json(line, "the pair")
        if isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair):
            return pair[0], pair[1]
    parts = line.split("\t")
    if len(parts) != 2:
        raise UsageError(
            f'{shorten(line)} is no pair: write a JSON list of two texts, ["query", "document"], or two '
            "texts with a TAB between them."
        )
    return parts[0], parts[1]


def _one_line(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _SHOWN_CHARACTERS else flat[: _SHOWN_CHARACTERS - 1] + "…"
