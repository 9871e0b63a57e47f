"""What a graph does between the head's product and the logits: a bias, a scale, a soft cap."""

from collections.abc import Callable, Mapping

import numpy as np

from trimserve.arrays import Floats
from trimserve.files.checked_json import convert_json, parse_json

# What stands between the head's product and the logits: operators with the number each takes, None where
# it takes none (Tanh, Round) or one a token (an Add of the bias). The serving passes write it into the graph.
AfterHead = tuple[tuple[str, float | None], ...]
AFTER_HEAD_KEY = "trimserve.after_head"


def read_after_head(metadata: Mapping[str, str]) -> AfterHead:
    """What the serving passes wrote into a graph's metadata."""
    origin, advice = "what stands behind the graph's head", "export the folder again."
    content = parse_json(metadata.get(AFTER_HEAD_KEY, "[]"), origin, advice=advice)
    return convert_json(content, tuple[tuple[str, float | None], ...], origin, advice=advice)


def apply_after_head(product: Floats, bias: Floats, after_head: AfterHead) -> Floats:
    """Make logits of the product of hidden states and head rows, as the graph does.

    Args:
        product: float32 (..., n).
        bias: float32 (n,), of the same token ids; zeros where the head has none.
        after_head: see `AfterHead`.
    """
    logits = product
    for operator, number in after_head:
        value = bias if number is None else np.float32(number)
        unary = _UNARY.get(operator)
        logits = _ARITHMETIC[operator](logits, value) if unary is None else unary(logits)
    return logits


_UNARY: dict[str, Callable[[Floats], Floats]] = {"Tanh": np.tanh, "Round": np.rint}
_ARITHMETIC: dict[str, Callable[..., Floats]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Max": np.maximum,
    "Min": np.minimum,
}


def slope_after(after_head: AfterHead) -> float | None:
    """The factor from a product to its logit; None where what follows is not linear."""
    slope = 1.0
    for operator, number in after_head:
        if operator in ("Add", "Sub"):
            continue
        if operator not in ("Mul", "Div") or number is None:
            return None
        slope *= number if operator == "Mul" else 1 / number
    return slope
