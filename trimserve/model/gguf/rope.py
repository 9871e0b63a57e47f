"""How a GGUF file says what its rotary position embeddings are scaled by, as transformers' rope_scaling."""

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from trimserve.errors import UnsupportedModelError
from trimserve.files.gguf import GgufFile

Json = dict[str, Any]
_FREQUENCIES: Final = "rope_freqs.weight"
_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
# Llama 3.1 and 3.2; the file has the factors that follow from them and not the settings themselves.
_LLAMA3_FACTORS: Final = (8.0, 32.0, 16.0, 4.0)
_LOW, _HIGH, _ORIGINAL = 1.0, 4.0, 8192


def rope_scaling(file: GgufFile, name: str, theta: float, rotated: int) -> Json | None:
    """The config's `rope_scaling`.

    Args:
        file: the file.
        name: of its architecture.
        theta: the base of its frequencies.
        rotated: numbers of a head that are rotated.

    Raises:
        UnsupportedModelError: a scaling that no setting of transformers is known to give.
    """
    if _LONG in file.tensors or _SHORT in file.tensors:
        return _longrope(file, rotated)
    if _FREQUENCIES in file.tensors:
        return _llama3(file, theta, rotated)
    kind = file.text(f"{name}.rope.scaling.type", "none")
    factor = file.number(f"{name}.rope.scaling.factor", file.number(f"{name}.rope.scale_linear", 1.0))
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = file.integer(f"{name}.rope.scaling.original_context_length")
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    raise _unknown(file, f"{name}.rope.scaling.type is {kind[:60]!r}")


def _longrope(file: GgufFile, rotated: int) -> Json:
    factors = {}
    for key, tensor in (("long_factor", _LONG), ("short_factor", _SHORT)):
        if tensor not in file.tensors or file.tensors[tensor].shape != (rotated // 2,):
            raise _unknown(file, f"{tensor} does not hold {rotated // 2} factors")
        factors[key] = file.tensors[tensor].floats()[0].astype(float).tolist()
    return {"type": "longrope", **factors}


def _llama3(file: GgufFile, theta: float, rotated: int) -> Json | None:
    tensor = file.tensors[_FREQUENCIES]
    if tensor.shape != (rotated // 2,):
        raise _unknown(file, f"{_FREQUENCIES} does not hold {rotated // 2} factors")
    found = tensor.floats()[0]
    if (found == 1).all():
        return None
    for factor in _LLAMA3_FACTORS:
        if np.abs(found / _llama3_factors(theta, rotated, factor) - 1).max() < 1e-5:
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": _LOW,
                "high_freq_factor": _HIGH,
                "original_max_position_embeddings": _ORIGINAL,
            }
    raise _unknown(file, f"{_FREQUENCIES} has factors of no known Llama")


def _llama3_factors(theta: float, rotated: int, factor: float) -> npt.NDArray[np.float64]:
    """What each frequency is divided by: 1 for short waves, `factor` for long ones."""
    frequencies = theta ** -(np.arange(0, rotated, 2) / rotated)
    waves = _ORIGINAL * frequencies / (2 * math.pi)  # how often a wave fits into the original context
    smooth = np.clip((waves - _LOW) / (_HIGH - _LOW), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _unknown(file: GgufFile, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{file.path} scales its rotary embeddings in a way that trimserve does not read ({what}): pass the "
        "model that the file was made from."
    )
