"""Dead ids: those that no text whatever can lead to, so that nothing is lost with their rows.

A piece is called dead only where that is proven from how its tokenizer's model works; a model that is not
understood has none. What normalizer and pre-tokenizer do can make more pieces unreachable: that is examined
for BERT's alone, which treat each character apart from its neighbours.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from trimserve.arrays import Ids
from trimserve.text.tokenizer import is_byte_token, tokenizer_border, tokenizer_ids

# By how much another segmentation must beat a piece: scores are added up along a whole sentence.
_SCORE_MARGIN = 1e-4
_FIRST_SURROGATE, _LAST_SURROGATE = 0xD800, 0xDFFF


@tokenizer_border
def dead_ids(tokenizer: Tokenizer) -> Ids:
    """Find the ids that no text leads to.

    - BPE: a piece whose own characters, given to the model as one word, merge to anything else. Where a word
      becomes the tokens t1 ... tn, no merge crossed the borders of ti, so the merges inside took place in
      the order in which they take place in ti alone, and made ti of it. See also I. Chatzi et al.,
      Canonical Autoregressive Generation, arXiv:2506.06446 (parts of a canonical sequence are canonical).
    - Unigram: a piece whose own characters have a segmentation of a higher score. Put in the place of the
      piece, it would raise the score of any segmentation that holds the piece.
    - WordPiece behind BERT's normalizer and pre-tokenizer: a piece with a character that the normalizer
      never lets through, or, in a piece of several characters or inside a word, one that is always made
      a word of its own (punctuation, Chinese characters).

    Added and special tokens, unknown tokens and bytes are never among them.

    Returns:
        int32 ids, increasing; empty for other models.
    """
    model = json.loads(tokenizer.to_str())["model"]
    spared = set(tokenizer.get_added_tokens_decoder()) | set(tokenizer_ids(tokenizer))
    pieces = tokenizer.get_vocab(with_added_tokens=False).items()
    candidates = {token: id_ for token, id_ in pieces if id_ not in spared and not is_byte_token(token)}
    finder = {"BPE": _unmerged, "Unigram": _outscored, "WordPiece": _split_by_bert}.get(model["type"])
    found = finder(tokenizer, model, candidates) if finder else ()
    return np.array(sorted(found), np.int32)


def _unmerged(tokenizer: Tokenizer, model: dict[str, Any], pieces: dict[str, int]) -> Iterator[int]:
    # Affixes spell the first or last characters of a word differently, dropout skips merges at random.
    if any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
        return
    for piece, id_ in pieces.items():
        if [token.id for token in tokenizer.model.tokenize(piece)] != [id_]:
            yield id_


def _outscored(tokenizer: Tokenizer, model: dict[str, Any], pieces: dict[str, int]) -> Iterator[int]:
    vocab = model["vocab"]
    # Bytes and unknown tokens have scores that the vocab does not tell.
    unscored = {model["unk_id"]} | {id_ for id_, (token, _) in enumerate(vocab) if is_byte_token(token)}
    for piece, id_ in pieces.items():
        found = [token.id for token in tokenizer.model.tokenize(piece)]
        if found == [id_] or unscored.intersection(found):
            continue
        if sum(vocab[other][1] for other in found) > vocab[id_][1] + _SCORE_MARGIN:
            yield id_


def _split_by_bert(tokenizer: Tokenizer, model: dict[str, Any], pieces: dict[str, int]) -> Iterator[int]:
    steps = json.loads(tokenizer.to_str())
    kinds = [(steps[part] or {}).get("type") for part in ("normalizer", "pre_tokenizer")]
    if kinds != ["BertNormalizer", "BertPreTokenizer"]:
        return
    prefix = model["continuing_subword_prefix"]
    spelled = {piece: piece.removeprefix(prefix) for piece in pieces}
    possible = _normalizer_output(tokenizer)
    alone = _words_of_their_own(tokenizer, set("".join(spelled.values())) & possible)
    longest = model["max_input_chars_per_word"]
    for piece, id_ in pieces.items():
        characters = set(spelled[piece])
        inside = len(spelled[piece]) > 1 or piece != spelled[piece]
        if characters - possible or (inside and characters & alone) or len(spelled[piece]) > longest:
            yield id_


def _normalizer_output(tokenizer: Tokenizer) -> set[str]:
    """Every character that the normalizer can give: what it makes of all that Unicode has."""
    scalars = (chr(c) for c in range(0x110000) if not _FIRST_SURROGATE <= c <= _LAST_SURROGATE)
    return set(tokenizer.normalizer.normalize_str("".join(scalars)))


def _words_of_their_own(tokenizer: Tokenizer, characters: Iterable[str]) -> set[str]:
    """The characters that stay no part of a word between two letters."""
    return {c for c in characters if not _joins(tokenizer, c)}


def _joins(tokenizer: Tokenizer, character: str) -> bool:
    text = tokenizer.normalizer.normalize_str(f"a{character}a")
    return len(tokenizer.pre_tokenizer.pre_tokenize_str(text)) == 1
