r"""How far a logit can be from the real number it stands for, and from a coarser copy of its row.

Notation: w is a row of the head, h a hidden state, n their length, <w, h> the real inner product, fl(...)
what a processor computes. Everything here is an upper bound, computed in float64 and rounded outwards.

**Rounding of a product.** Whatever the order of the sum, with or without fused multiply-add,

    |fl(<w, h>) - <w, h>|  <=  gamma_m * sum_k |w_k h_k|  <=  gamma_m * ||w|| * ||h||,
    gamma_m = m u / (1 - m u),

with u = 2^-24 the unit roundoff of float32 and m >= n the largest number of roundings that a term meets
(Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed. 2002, sections 3.1 and 4.2: lemma 3.1 and
equation 3.5 do not depend on the order; the last step is the Cauchy-Schwarz inequality). m = 2 n + 32 also
covers rows that are converted or dequantised before the product (two more roundings a weight and the scale
of a block of activations). Results too small for a normal number lose at most 2^-126 each, gradual
underflow or not (Higham, equation 2.8, with the smallest normal number in place of the smallest subnormal
one), and operands that are flushed to zero at most 2^-126 times the other operand. Nothing can overflow
while ``||w|| * ||h||`` is far below the largest float32, because every partial sum is bounded by it.

**Quantised heads.** MatMulNBits adds ``s_a s_b <q_a, q_b>`` block by block and may correct its zero point
in a sum of its own, whose terms are larger than ``|w_k h_k|``: `block_magnitude` bounds both sums. At
accuracy level 4 it rounds the activations to 8 bits first, on most processors: `rounding_distance` bounds
how far what it multiplies can be from h, whether it rounds or not.

**A sketch of 4 bits** is multiplied by MatMulNBits, too. With b the row that its blocks stand for, h' what
the kernel makes of h, and fl its float32 result,

    <w, h>  =  <b, h'> + <b, h - h'> + <w - b, h>
           <=  fl + gamma_m * M + ||b|| * ||h - h'|| + ||w - b|| * ||h||,    M = `block_magnitude` * ||h'||,

by the two paragraphs above and the Cauchy-Schwarz inequality. Row groups and hidden states are divided by
powers of two before, which is exact, and blocks smaller than 2^-40 of the largest entry count as zeros: so no
scale, and no product of two, can underflow or overflow.

**What follows the product** (bias, scale, softcap) is a chain of operations that are monotone and rounded to
nearest. A rounded monotone operation is monotone, so a bound goes through it; a constant factor must be
positive. `after_head_bound` adds each operation's rounding, and 2^-18 for a tanh, whose approximation need
not be monotone (ONNX Runtime's is within 2^-20 of the real one; a test measures it).
"""

import platform
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Doubles
from trimserve.files.quantized import BlockScheme, round_activations
from trimserve.runtime.after_head import AfterHead

UNIT_ROUNDOFF = 2.0**-24
_SMALLEST_NORMAL = 2.0**-126
# Below this no partial sum of a float32 product can overflow.
_LARGEST_PRODUCT = 2.0**120
_TANH_ERROR = 2.0**-18
# Float64 arithmetic on at most 2^20 terms is this accurate, with room to spare.
_SLACK = 1e-9
X86 = ("x86_64", "AMD64")


def round_up(values: npt.ArrayLike) -> Doubles:
    """Make float64 results of the arithmetic here safe as upper bounds of non-negative numbers."""
    return np.asarray(values, np.float64) * (1 + _SLACK)


def norms(rows: Doubles) -> Doubles:
    """Euclidean norms of the last axis, rounded up."""
    squares: Doubles = np.einsum("...k,...k->...", rows, rows)
    return round_up(np.sqrt(squares))


def product_error(width: int, hidden_norms: Doubles, largest_magnitude: float) -> tuple[Doubles, Doubles]:
    """Bound ``|fl(<w, h>) - <w, h>|`` by ``slope * magnitude + constant``.

    The magnitude is a bound of ``||w||``; for a quantised row it is what `block_magnitude` gives.

    Args:
        width: n.
        hidden_norms: bounds of ``||h||`` (N,).
        largest_magnitude: of all rows.

    Returns:
        Slope and constant, float64 (N,) each; the constant is infinite where a partial sum might overflow.
    """
    roundings = (2 * width + 32) * UNIT_ROUNDOFF
    underflow = 4 * _SMALLEST_NORMAL
    # 1e-12 covers the float64 sums of the same terms.
    slope = (roundings / (1 - roundings) + 1e-12) * hidden_norms + underflow * np.sqrt(width)
    constant = underflow * (width + np.sqrt(width) * hidden_norms)
    # A comparison with NaN is false: what is not known to be small is infinite.
    bounded = (largest_magnitude * hidden_norms < _LARGEST_PRODUCT) & (roundings < 0.5)
    return round_up(slope), np.where(bounded, round_up(constant), np.inf)


def block_magnitude(scales: npt.NDArray[np.float32], scheme: BlockScheme) -> Doubles:
    """A bound of ``||w||`` for rounding errors, of rows quantised in blocks: scales (n, blocks) -> (n,).

    The integers and zero points of a block are below 2^bits each, and the two sums that MatMulNBits may
    make of them hold ``|q| + |z|`` a weight at most.
    """
    largest = 2.0 ** (scheme.bits + 1)
    sizes: Doubles = norms(scales.astype(np.float64)) * (largest * np.sqrt(scheme.block_size))
    return sizes


def rounding_distance(hidden: Doubles, scheme: BlockScheme | None) -> Doubles:
    """How far from h the head's kernel may round it, as a Euclidean norm: (N, H) -> (N,)."""
    if scheme is None or scheme.accuracy_level != 4:
        return np.zeros(len(hidden))
    rounded = round_activations(hidden, scheme).astype(np.float64)
    # The kernel may multiply by a reciprocal where we divide: an entry within a thousandth of the middle
    # between two integers could go to the other one, a whole step away.
    steps = _block_steps(hidden, scheme.block_size)
    quotient = np.divide(hidden, steps, out=np.zeros_like(hidden), where=steps > 0)
    unsure = np.abs(np.abs(quotient) % 1 - 0.5) < 1e-3
    return norms(rounded - hidden) + norms(np.where(unsure, steps, 0.0)) + 1e-6 * norms(hidden)


def _block_steps(values: Doubles, block_size: int) -> Doubles:
    width = values.shape[-1]
    padded = np.pad(np.abs(values), ((0, 0), (0, -width % block_size)))
    largest = padded.reshape(len(values), -1, block_size).max(axis=-1) / 127
    steps: Doubles = np.repeat(largest, block_size, axis=-1)[:, :width]
    return steps


@dataclass(frozen=True, slots=True)
class HeadArithmetic:
    """How a graph computes logits.

    Attributes:
        after_head: what follows the product, see `decoder.AfterHead`.
        half: whether the graph is in float16: each result is then rounded to 11 bits.
        scheme: how the head is quantised, if it is.
    """

    after_head: AfterHead = ()
    half: bool = False
    scheme: BlockScheme | None = None

    @property
    def can_be_bounded(self) -> bool:
        """Whether every operation is known and monotone, and the kernels of this processor are known.

        Elsewhere than on x86, float16 products may be summed in float16, which no useful bound follows
        from, and activations may be rounded a row at a time.
        """
        factors = [number for operator, number in self.after_head if operator in ("Mul", "Div")]
        known = all(operator == "Tanh" or operator in _EXACT for operator, _ in self.after_head)
        monotone = known and all(number is not None and 0 < number < np.inf for number in factors)
        return monotone and (platform.machine() in X86 or not (self.half or self.scheme))

    def bound(self, products: Doubles, bias: npt.ArrayLike, side: Literal[-1, 1]) -> Doubles:
        """Bound logits, given bounds of their products.

        Args:
            products: upper (side 1) or lower (side -1) bounds of products, float64.
            bias: upper or lower bounds of the bias, of a shape that broadcasts; unused if there is none.
            side: which bound.

        Returns:
            float64, of the same shape.
        """
        unit, smallest = (2.0**-11, 2.0**-24) if self.half else (UNIT_ROUNDOFF, _SMALLEST_NORMAL)

        def outwards(values: Doubles, extra: float = 0.0) -> Doubles:
            error = round_up(2 * unit * np.abs(values) + smallest + extra)
            return values + side * error

        # Without a bias or a scale float32 logits are the products, whose rounding the caller bounded.
        values = outwards(products) if self.half else products
        for operator, number in self.after_head:
            operand = np.asarray(bias if number is None else np.float32(number), np.float64)
            if operator == "Tanh":
                values = outwards(np.tanh(values), _TANH_ERROR)
            else:
                values = outwards(_EXACT[operator](values, operand))
        return values


_EXACT = {"Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Div": np.divide}
