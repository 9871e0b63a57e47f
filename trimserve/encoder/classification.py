"""Labels of a text: what transformers' text-classification pipeline makes of a head's numbers."""

from collections.abc import Mapping
from typing import Any, Literal, TypedDict, get_args

import numpy as np

from trimserve.arrays import Floats
from trimserve.encoder.activations import softmax
from trimserve.errors import UsageError

# How numbers become scores: none leaves them as they are, which is what a regression wants.
Function = Literal["sigmoid", "softmax", "none"]


class Label(TypedDict):
    """A label and its score, with the pipeline's keys."""

    label: str
    score: float


def label_names(config: Mapping[str, Any], count: int) -> list[str]:
    """Names of a head's labels by config.json; ``LABEL_0`` and so on where it has none."""
    names = config.get("id2label") or {}
    return [str(names.get(str(number), f"LABEL_{number}")) for number in range(count)]


def function_of(config: Mapping[str, Any], labels: int) -> Function:
    """Which function the pipeline applies: by `problem_type`, else by the number of labels."""
    kind = config.get("problem_type")
    if kind == "regression":
        return "none"
    return "sigmoid" if kind == "multi_label_classification" or labels == 1 else "softmax"


def classify(
    logits: Floats, config: Mapping[str, Any], *, top_k: int | None = None, function: Function | None = None
) -> list[Label]:
    """Scores of a text's labels, the largest first.

    Args:
        logits: float32 (labels,).
        config: config.json, which names the labels and says of which kind they are.
        top_k: how many to give; all by default.
        function: what turns numbers into scores; as the pipeline chooses by default.

    Raises:
        UsageError: an unknown function, or `top_k` is not positive.
    """
    if function is not None and function not in get_args(Function):
        raise UsageError(f"function should be sigmoid, softmax or none, found {function!r}.")
    if top_k is not None and top_k < 1:
        raise UsageError(f"top_k should be 1 or more, found {top_k}.")
    chosen = function or function_of(config, len(logits))
    scores = logits
    if chosen == "sigmoid":
        scores = (1 / (1 + np.exp(-logits))).astype(np.float32)
    elif chosen == "softmax":
        scores = softmax(logits)
    names = label_names(config, len(logits))
    order = np.argsort(-scores, kind="stable")[:top_k].tolist()
    return [Label(label=names[place], score=float(scores[place])) for place in order]
