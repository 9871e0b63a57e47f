"""Make the tables of a tokenizer, at export; refuse one for which they are not proven to be enough."""

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from trimserve.errors import UnsupportedModelError
from trimserve.text.mapped.spelling import Spelling, crosses_words
from trimserve.text.mapped.tables import Numbers, Tables
from trimserve.text.mapped.trie import build_trie
from trimserve.text.tokenizer import is_byte_token, parse_tokenizer

_MOST_ALWAYS = 512
_SETTINGS = {
    "Unigram": ("unk_id", "byte_fallback"),
    "BPE": ("unk_token", "fuse_unk", "byte_fallback", "ignore_merges"),
    "WordPiece": ("unk_token", "continuing_subword_prefix", "max_input_chars_per_word"),
}
# They make the answer random, or spell pieces otherwise than a text is spelled.
_UNKNOWN = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")


def build_tables(content: bytes, sha256: str) -> Tables:
    """Make the tables of a tokenizer.

    Args:
        content: a tokenizer.json.
        sha256: its hash.

    Raises:
        UnsupportedModelError: its model is none that tables are proven for; the message says why.
        MismatchError: see `parse_tokenizer`.
    """
    # As the library writes it: its reader of decimals is not Python's, and gives scores one bit beside.
    read = json.loads(parse_tokenizer(content).to_str())
    model = read["model"]
    kind = model.get("type")
    if kind not in _SETTINGS:
        raise UnsupportedModelError(f"a {kind} model has no tables: it stays in memory.")
    if kind == "BPE" and (odd := next((key for key in _UNKNOWN if model.get(key)), None)):
        raise UnsupportedModelError(f"a BPE model with {odd} has no tables: it stays in memory.")
    pieces, ids, scores = _pieces(model)
    shell = {key: value for key, value in read.items() if key not in ("model", "padding", "truncation")}
    number = {piece: place for place, piece in enumerate(pieces)}
    left, right = _merges(model, number)
    order, merge_ends = _by_result(left, right, pieces, number)
    always = _always(model, pieces, number, scores, Spelling.of(shell, model))
    trie = build_trie(pieces)
    spelled = [piece.encode() for piece in pieces]
    return Tables(
        edges=trie.edges,
        nodes=trie.pieces,
        ids=ids,
        spelling=np.frombuffer(b"".join(spelled), np.uint8),
        ends=np.cumsum([len(piece) for piece in spelled], dtype=np.int64),
        scores=scores,
        left=left,
        right=right,
        merges=order,
        merge_ends=merge_ends,
        always=always,
        shell=np.frombuffer(json.dumps(shell, ensure_ascii=False).encode(), np.uint8),
        model={"type": kind} | {key: model.get(key) for key in _SETTINGS[kind]},
        longest=max(map(len, pieces), default=0),
        tokenizer_sha256=sha256,
    )


def _pieces(model: Mapping[str, Any]) -> tuple[list[str], Numbers, npt.NDArray[np.float64]]:
    """The pieces in the order of their ids, the ids, and the scores of a Unigram model."""
    vocab = model["vocab"]
    if isinstance(vocab, list):
        pieces = [piece for piece, _ in vocab]
        if len(set(pieces)) < len(pieces) or "" in pieces:
            raise UnsupportedModelError(
                "a Unigram model with a piece twice has no tables: it stays in memory."
            )
        scores = np.array([score for _, score in vocab], np.float64)
        return pieces, np.arange(len(pieces), dtype=np.int32), scores
    pieces = sorted(vocab, key=vocab.__getitem__)
    ids = np.array([vocab[piece] for piece in pieces], np.int32)
    if np.any(np.diff(ids) == 0) or "" in vocab:
        raise UnsupportedModelError("a model with two pieces of one id has no tables: it stays in memory.")
    return pieces, ids, np.empty(0, np.float64)


def _merges(model: Mapping[str, Any], number: Mapping[str, int]) -> tuple[Numbers, Numbers]:
    pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model.get("merges", ())]
    left = np.array([number[one] for one, _ in pairs], np.int32)
    return left, np.array([number[other] for _, other in pairs], np.int32)


def _by_result(
    left: Numbers, right: Numbers, pieces: Sequence[str], number: Mapping[str, int]
) -> tuple[Numbers, npt.NDArray[np.int64]]:
    pairs = zip(left.tolist(), right.tolist(), strict=True)
    results = np.array([number[pieces[one] + pieces[other]] for one, other in pairs], np.int64)
    order = np.argsort(results, kind="stable").astype(np.int32)
    return order, np.cumsum(np.bincount(results, minlength=len(pieces)), dtype=np.int64)


def _always(
    model: Mapping[str, Any],
    pieces: Sequence[str],
    number: Mapping[str, int],
    scores: npt.NDArray[np.float64],
    spelling: Spelling,
) -> Numbers:
    """The pieces that may be used, or count, without standing in a word of a text's chunk."""
    always: list[int] = []
    if scores.size:
        # The score of an unknown character is taken from the lowest.
        always.append(int(np.argmin(scores)))
        always += [] if model.get("unk_id") is None else [int(model["unk_id"])]
    if model.get("unk_token") in number:
        always.append(number[model["unk_token"]])
    if model.get("byte_fallback"):
        always += [place for place, piece in enumerate(pieces) if is_byte_token(piece)]
    if spelling.chunked:
        crossing = (place for place, piece in enumerate(pieces) if crosses_words(piece, spelling.space))
        found = list(itertools.islice(crossing, _MOST_ALWAYS + 1))
        if len(found) > _MOST_ALWAYS:
            raise UnsupportedModelError(
                f"a vocab with over {_MOST_ALWAYS} pieces of several words has no tables: it stays in memory."
            )
        always += found
    return np.unique(np.array(always, np.int32))
