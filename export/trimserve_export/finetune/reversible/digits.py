"""Streams that can be taken back exactly: a fixed grid, and the digits that a factor drops.

y = s * x + f is undone by x = (y - f) / s. In floating point each such step multiplies the rounding error of
y by 1/s: with the paper's s = 0.1 a decimal digit a layer, of the seven that fp32 has. Here a stream lies on
the grid of multiples of 2^-30 in float64, where sums are exact, and what the rounding of s * x drops, an
integer of |d| <= 0.5 / s + 0.5 grid steps, is kept in four or eight bits (as Maclaurin, Duvenaud & Adams
2015, arXiv:1502.03492, section 2.3, keep the digits that a momentum drops). So the inversion is exact at any
depth, and the grid is finer than fp32 for all values above 2^-6. Sums are exact up to 2^53 * 2^-30 =
8,388,608.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_STEP = 2.0**-30
_NIBBLE = 8
_BYTE = 128


def snap(values: "Tensor") -> "Tensor":
    """The nearest multiples of 2^-30, float64; NaN and infinities stay."""
    return values.double().div_(_STEP).round_().mul_(_STEP)


@dataclass(frozen=True, slots=True)
class Scale:
    """The factor of a stream.

    Attributes:
        value: 1/250 to 1, so that 0.5 / value + 0.5 fits into a signed byte.
    """

    value: float

    @property
    def bits(self) -> int:
        """Bits kept a number: 0, 4 or 8."""
        if self.value == 1:
            return 0
        return 4 if math.floor(0.5 / self.value + 0.5) < _NIBBLE else 8

    def shrink(self, stream: "Tensor") -> "tuple[Tensor, Tensor | None]":
        """Multiply and round.

        Args:
            stream: float64, on the grid.

        Returns:
            The product on the grid, and the packed digits, uint8, that `expand` needs (None for a scale of
            1).
        """
        if self.bits == 0:
            return stream, None
        product = snap(stream * self.value)
        return product, _pack((stream - snap(product / self.value)).div_(_STEP), self.bits)

    def expand(self, product: "Tensor", digits: "Tensor | None") -> "Tensor":
        """The stream whose product and digits these are, exactly."""
        if digits is None:
            return product
        return snap(product / self.value) + _unpack(digits, self.bits, product) * _STEP


def _pack(numbers: "Tensor", bits: int) -> "Tensor":
    import torch

    flat = numbers.flatten().nan_to_num_(0.0, 0.0, 0.0)
    if bits == 8:
        return flat.add_(_BYTE).to(torch.uint8)
    half = flat.add_(_NIBBLE).to(torch.uint8)
    half = torch.nn.functional.pad(half, (0, half.numel() % 2)).view(-1, 2)
    return half[:, 0] | (half[:, 1] << 4)


def _unpack(packed: "Tensor", bits: int, like: "Tensor") -> "Tensor":
    import torch

    if bits == 8:
        return (packed.to(like.dtype) - _BYTE).view_as(like)
    numbers = torch.stack((packed & 15, packed >> 4), 1).flatten()[: like.numel()]
    return (numbers.to(like.dtype) - _NIBBLE).view_as(like)
