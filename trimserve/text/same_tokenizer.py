"""Whether two tokenizer.json texts give the same ids, offsets and decoded text for every input.

A library that loads a tokenizer.json and writes it again says the same thing in other words: no template for
an empty one, an empty prefix for none, a sequence of one. What is not known to mean the same is different.
"""

import json
import math
from typing import Any

Json = Any
# What a runtime sets itself, and the number of the format.
_NOT_COMPARED = frozenset({"padding", "truncation", "version"})
# A file with decimals is read to the nearest double by some readers and to one beside it by others.
_ROUNDING = 1e-12


def same_tokenizer(one: str, other: str) -> bool:
    """Compare two tokenizers as tokenizer.json texts; padding and truncation are left out."""
    if one == other:
        return True
    first, second = json.loads(one), json.loads(other)
    keys = (first.keys() | second.keys()) - _NOT_COMPARED
    return all(_same_part(key, first.get(key), second.get(key)) for key in keys)


def _same_part(key: str, one: Json, other: Json) -> bool:
    if one == other:
        return True
    if key == "post_processor":
        return bool(_template(one) == _template(other))
    if key == "model":
        return _same_model(one, other)
    if key == "added_tokens":
        return _by_id(one) == _by_id(other)
    return bool(_unwrapped(one) == _unwrapped(other))


def _by_id(tokens: Json) -> list[Json]:
    return sorted(tokens or [], key=lambda token: int(token["id"]))


def _unwrapped(step: Json) -> Json:
    """A normalizer, pre-tokenizer or decoder; a sequence of one is that one, an empty one is none."""
    if step and step.get("type") == "Sequence":
        members = next(value for key, value in step.items() if key != "type")
        flat = [found for member in members if (found := _unwrapped(member)) is not None]
        if len(flat) < 2:
            return flat[0] if flat else None
        return {"type": "Sequence", "members": flat}
    return step


def _template(processor: Json) -> Json:
    """A post-processor as what it puts around one text and around two: [token ids or text, type id]."""
    kind = None if processor is None else processor["type"]
    if kind is None:
        return {"single": [["A", 0]], "pair": [["A", 0], ["B", 1]]}
    if kind == "BertProcessing":
        (_, cls), (_, sep) = processor["cls"], processor["sep"]
        single = [[[cls], 0], ["A", 0], [[sep], 0]]
        return {"single": single, "pair": [*single, ["B", 1], [[sep], 1]]}
    if kind == "TemplateProcessing":
        ids = {name: entry["ids"] for name, entry in (processor["special_tokens"] or {}).items()}
        return {key: [_piece(piece, ids) for piece in processor[key]] for key in ("single", "pair")}
    return processor


def _piece(piece: Json, ids: dict[str, list[int]]) -> Json:
    (kind, entry), *_ = piece.items()
    return [entry["id"] if kind == "Sequence" else ids[entry["id"]], entry["type_id"]]


def _same_model(one: Json, other: Json) -> bool:
    keys = one.keys() | other.keys()
    return all(_same_entry(key, one.get(key), other.get(key)) for key in keys)


def _same_entry(key: str, one: Json, other: Json) -> bool:
    if key in ("continuing_subword_prefix", "end_of_word_suffix") and not one and not other:
        return True  # BPE: None and "" add the same
    if key == "vocab" and isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(
            a[0] == b[0] and math.isclose(a[1], b[1], rel_tol=_ROUNDING)
            for a, b in zip(one, other, strict=True)
        )
    return bool(one == other)
