"""The file of a vocab: the map as its one tensor, reasons and the head's ids as metadata."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from trimserve.arguments import AnyPath
from trimserve.errors import MismatchError
from trimserve.files.artefact import load_artefact, save_artefact
from trimserve.files.checked_json import convert_json
from trimserve.files.held import HeldFile
from trimserve.files.model_json import MOST_ROWS, Rows
from trimserve.vocab.map import VocabMap


def save_vocab(vocab: VocabMap, path: Path) -> None:
    """Write `vocab_map.safetensors`: int32 `vocab_map` (K,), and in its metadata a digit of `Reason` an id.

    Where fewer ids have a row in the head, the metadata also has a 1 for each that has one, else a 0.
    `vocab_map` is the only tensor, as TensorRT-Edge-LLM's runtime demands of a file of this name.
    """
    facts = {
        "reason": "".join(map(str, vocab.reason.tolist())),
        "vocab_size": vocab.vocab_size,
        "tokenizer_sha256": vocab.tokenizer_sha256,
        "rule": vocab.rule,
    }
    if vocab.output_ids is not None:
        facts["output"] = "".join(map(str, vocab.head.is_kept(vocab.kept_ids).astype(int).tolist()))
    save_artefact(path, "vocab", {"vocab_map": vocab.kept_ids}, facts)


def load_vocab(path: AnyPath | HeldFile) -> VocabMap:
    """Read a vocab file.

    Raises:
        UsageError: there is no such file.
        MismatchError: it is no vocab, its ids are out of order or out of range, or the vocab that it is cut
            from has more ids than any model.
    """
    file = path if isinstance(path, HeldFile) else Path(path)
    shown = file.path if isinstance(file, HeldFile) else file
    arrays, facts = load_artefact(file, "vocab")
    told = convert_json(facts, _Facts, f"the metadata of {shown}", advice=_AGAIN)
    convert_json(told.rule, _Rule, f"the rule of {shown}", advice=_AGAIN)
    # Reasons were an array before they moved to the metadata.
    reason = arrays.get("reason", None if told.reason is None else _digits(told.reason))
    if arrays.keys() - {"reason"} != {"vocab_map"} or reason is None:
        raise MismatchError(f"{shown} should hold vocab_map and a reason for each id: {_AGAIN}")
    kept = arrays["vocab_map"]
    if kept.ndim != 1 or kept.dtype.kind not in "iu":
        raise MismatchError(f"{shown} should hold a list of ids, not {kept.dtype} {kept.shape}: {_AGAIN}")
    output = None if told.output is None else _digits(told.output) > 0
    if output is not None and output.shape != kept.shape:
        raise MismatchError(f"{shown} does not say of each id whether it is an output id: {_AGAIN}")
    return VocabMap(
        kept_ids=kept,
        reason=reason,
        vocab_size=told.vocab_size,
        tokenizer_sha256=told.tokenizer_sha256,
        rule=told.rule,
        output_ids=None if output is None else kept[output],
    )


_AGAIN = "select the vocab again."
_Count = Annotated[int, Meta(ge=0, le=1 << 62)]
Digits = Annotated[str, Meta(pattern="^[0-9]*$", max_length=MOST_ROWS)]


@dataclass(frozen=True, slots=True)
class _Facts:
    """The metadata of a vocab's file."""

    vocab_size: Rows
    tokenizer_sha256: str
    rule: dict[str, Any]
    reason: Digits | None = None
    output: Digits | None = None


class _Options(TypedDict, total=False):
    """Of the options of a rule, those that are read again."""

    multiple_of: Annotated[int, Meta(ge=1)]
    min_docs: Annotated[int, Meta(ge=0)]


class _Corpus(TypedDict):
    name: str
    sha256: str


class _Rule(TypedDict, total=False):
    """How the ids were chosen, and what that gave; empty where they were given."""

    options: _Options
    coverage: float
    missing_mass: float
    missing_mass_bound: float
    reasons: dict[Literal["structural", "profile", "explicit", "fill", "dependency"], _Count]
    texts: _Count
    tokens: _Count
    row_bytes: _Count
    sources: list[_Corpus]
    profiles: dict[str, float]
    output_coverage: float
    head_rows: _Count
    head_coverage: float


def _digits(text: str) -> npt.NDArray[np.uint8]:
    return np.frombuffer(text.encode(), np.uint8) - ord("0")
