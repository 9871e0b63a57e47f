"""How far two fp32 computations of one model's numbers may lie apart, by its sizes."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PretrainedConfig

# Unit roundoff of fp32, and how many standard deviations of a sum's rounding error are allowed.
_ROUNDOFF, _DEVIATIONS = 2.0**-24, 4
# Products one after the other in a layer: query and key, value, output, and the two of the feed-forward part.
_PRODUCTS = 5
_WIDTHS = ("hidden_size", "intermediate_size", "d_model", "d_ff", "n_embd", "dim", "hidden_dim")


def rounding_bound(config: PretrainedConfig, numbers: npt.NDArray[np.floating[Any]]) -> float:
    """How far two fp32 computations of the same numbers may lie apart, where the model amplifies no error.

    See `relative_rounding`.

    Args:
        config: the model's.
        numbers: what one of the two computations gave.
    """
    return relative_rounding(config) * max(1.0, float(np.abs(numbers).max(initial=0.0)))


def relative_rounding(config: PretrainedConfig) -> float:
    """How far two fp32 computations may lie apart, relative to the numbers' size.

    A sum of n products has a rounding error of about sqrt(n) u times the numbers' size (Higham & Mary 2019,
    https://doi.org/10.1137/18M1226312), and errors of the products that follow one another add up: each of
    the two sides may be wrong by 4 standard deviations of that.

    Args:
        config: the model's.
    """
    text = config.get_text_config()
    named = (getattr(text, name, None) for name in _WIDTHS)
    width = max((number for number in named if isinstance(number, int)), default=1024)
    layers = getattr(text, "num_hidden_layers", None)
    products = _PRODUCTS * (layers if isinstance(layers, int) else 12) + 2
    return 2 * _DEVIATIONS * products * math.sqrt(width) * _ROUNDOFF
