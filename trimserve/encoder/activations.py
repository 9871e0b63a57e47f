"""Activation functions of torch.nn in numpy, as their classes make them without arguments."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Floats
from trimserve.errors import UnsupportedModelError

# torch.nn.SELU's constants (Klambauer et al. 2017, https://arxiv.org/abs/1706.02515).
_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805
# Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: |error| < 1.5e-7.
_ERF = (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429)
_ERF_SCALE = 0.3275911


def activate(name: str, values: Floats) -> Floats:
    """Apply an activation function.

    Args:
        name: one of `ACTIVATIONS`.
        values: float32 of any shape; the last axis counts for Softmax.

    Returns:
        float32 of the same shape.

    Raises:
        UnsupportedModelError: unknown name.
    """
    if name not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"unknown activation {name!r}: this version has {', '.join(sorted(ACTIVATIONS))}."
        )
    with np.errstate(over="ignore"):  # exp of a large number is infinity, which the formulas mean
        return np.asarray(ACTIVATIONS[name](values), np.float32)


def softmax(logits: Floats) -> Floats:
    """Probabilities over the last axis."""
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities: Floats = weights / weights.sum(axis=-1, keepdims=True)
    return probabilities


def sigmoid(values: Floats) -> Floats:
    """1 / (1 + exp(-x)), without overflow."""
    small = np.exp(-np.abs(values))
    result: Floats = np.where(values >= 0, 1 / (1 + small), small / (1 + small))
    return result


def _softplus(values: Floats) -> Floats:
    result: Floats = np.logaddexp(values, np.float32(0))
    return result


def _erf(values: Floats) -> Floats:
    wide = np.abs(values.astype(np.float64))
    step = 1 / (1 + _ERF_SCALE * wide)
    powers = np.polynomial.polynomial.polyval(step, (0.0, *_ERF))
    result: Floats = (np.sign(values) * (1 - powers * np.exp(-wide * wide))).astype(np.float32)
    return result


def _gelu(values: Floats) -> Floats:
    return np.asarray(values * (1 + _erf(values / np.float32(np.sqrt(2)))) / 2, np.float32)


def _elu(values: Floats) -> Floats:
    result: Floats = np.where(values > 0, values, np.expm1(np.minimum(values, 0)))
    return result


def _selu(values: Floats) -> Floats:
    low = _SELU_ALPHA * np.expm1(np.minimum(values, 0))
    return np.asarray(_SELU_SCALE * np.where(values > 0, values, low), np.float32)


# By the class's name in torch.nn; classes that need arguments or have weights are not here.
ACTIVATIONS: dict[str, Callable[[Floats], npt.NDArray[np.floating]]] = {
    "Identity": lambda x: x,
    "Tanh": np.tanh,
    "Sigmoid": sigmoid,
    "LogSigmoid": lambda x: -_softplus(-x),
    "ReLU": lambda x: np.maximum(x, 0),
    "ReLU6": lambda x: np.clip(x, 0, 6),
    "LeakyReLU": lambda x: np.where(x > 0, x, np.float32(0.01) * x),
    "ELU": _elu,
    "CELU": _elu,
    "SELU": _selu,
    "GELU": _gelu,
    "SiLU": lambda x: x * sigmoid(x),
    "Mish": lambda x: x * np.tanh(_softplus(x)),
    "Softplus": _softplus,
    "Softsign": lambda x: x / (1 + np.abs(x)),
    "Softmax": softmax,
    "Hardtanh": lambda x: np.clip(x, -1, 1),
    "Hardsigmoid": lambda x: np.clip(x / 6 + np.float32(0.5), 0, 1),
    "Hardswish": lambda x: x * np.clip(x / 6 + np.float32(0.5), 0, 1),
    "Tanhshrink": lambda x: x - np.tanh(x),
}
