"""The file of a vocab: the map as its one tensor, reasons and the head's ids as metadata."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trimserve.errors import MismatchError
from trimserve.files.artefact import Arrays, load_artefact, save_artefact
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


def load_vocab(path: Path) -> VocabMap:
    """Read a vocab file.

    Raises:
        UsageError: there is no such file.
        MismatchError: it is no vocab, or its ids are out of order or out of range.
    """
    arrays, facts = load_artefact(path, "vocab")
    try:
        return VocabMap(
            kept_ids=arrays["vocab_map"],
            reason=_reasons(arrays, facts),
            vocab_size=facts["vocab_size"],
            tokenizer_sha256=facts["tokenizer_sha256"],
            rule=facts["rule"],
            output_ids=arrays["vocab_map"][_digits(facts["output"]) > 0] if "output" in facts else None,
        )
    except KeyError as error:
        raise MismatchError(f"{path} lacks {error}: select the vocab again.") from error
    except IndexError as error:
        raise MismatchError(
            f"{path} does not say of each id whether it is an output id: select it again."
        ) from error


def _reasons(arrays: Arrays, facts: Mapping[str, Any]) -> npt.NDArray[np.uint8]:
    if "reason" in arrays:  # as written before they moved to the metadata
        return np.asarray(arrays["reason"])
    return _digits(facts["reason"])


def _digits(text: str) -> npt.NDArray[np.uint8]:
    return np.frombuffer(text.encode(), np.uint8) - ord("0")
