"""The file of a vocab: the map as its one tensor, reasons and the head's ids as metadata."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from trimserve.errors import MismatchError
from trimserve.files.artefact import Arrays, load_artefact, save_artefact
from trimserve.files.checked_json import convert_json
from trimserve.files.held import HeldFile
from trimserve.vocab.map import VocabMap

# Some bytes for each id are allocated when a vocab is read, however small its file is; real models have at
# most a million or so.
MOST_IDS = 1 << 24


@dataclass(frozen=True, slots=True)
class _Facts:
    """The metadata of a vocab file; see `save_vocab`."""

    vocab_size: Annotated[int, Meta(ge=1, le=MOST_IDS)]
    tokenizer_sha256: str
    rule: dict[str, Any] = field(default_factory=dict)
    reason: Annotated[str, Meta(pattern="^[0-9]*$")] = ""
    output: Annotated[str, Meta(pattern="^[01]*$")] | None = None


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


def load_vocab(path: Path | HeldFile) -> VocabMap:
    """Read a vocab file.

    Raises:
        UsageError: there is no such file.
        MismatchError: it is no vocab, its ids are out of order or out of range, or the vocab that it is cut
            from has more ids than any model.
    """
    arrays, stored = load_artefact(path, "vocab")
    shown = path.path if isinstance(path, HeldFile) else path
    if "vocab_map" not in arrays:
        raise MismatchError(f"{shown} lacks 'vocab_map': select the vocab again.")
    facts = convert_json(stored, _Facts, str(shown), advice="select the vocab again.")
    kept = arrays["vocab_map"]
    if kept.dtype.kind not in "iu" or kept.ndim != 1:
        raise MismatchError(
            f"{shown} should list ids as integers but has {kept.dtype} of shape {kept.shape}: select the "
            "vocab again."
        )
    output = None
    if facts.output is not None:
        named = _digits(facts.output)
        if len(named) != len(kept):
            raise MismatchError(
                f"{shown} does not say of each id whether it is an output id: select it again."
            )
        output = kept[named > 0]
    return VocabMap(
        kept_ids=kept,
        reason=_reasons(arrays, facts),
        vocab_size=facts.vocab_size,
        tokenizer_sha256=facts.tokenizer_sha256,
        rule=facts.rule,
        output_ids=output,
    )


def _reasons(arrays: Arrays, facts: _Facts) -> npt.NDArray[np.uint8]:
    if "reason" in arrays:  # as written before they moved to the metadata
        return np.asarray(arrays["reason"])
    return _digits(facts.reason)


def _digits(text: str) -> npt.NDArray[np.uint8]:
    return np.frombuffer(text.encode(), np.uint8) - ord("0")
