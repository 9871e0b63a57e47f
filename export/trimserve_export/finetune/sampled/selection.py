"""Which rows of a product are kept: winner-take-all column-row sampling.

WTA-CRS (Liu et al. 2023, arXiv:2305.15265, section 3): the gradient of a linear layer's weight is a sum over
rows (tokens), dY^T X = sum_i dy_i^T x_i. Of N rows k are kept. With probabilities p_i the rows C of largest
p are kept as they are, the others are drawn with replacement from what is left, k - |C| times, and scaled:

    sum_{i in C} dy_i^T x_i  +  sum_{j drawn} (1 - P_C) / ((k - |C|) p_j) * dy_j^T x_j,   P_C = sum_{i in C}
    p_i

whose mean is the exact sum, whatever p > 0 is. The size of C minimises (1 - P_C) / (k - |C|), the factor of
its variance (equation 6); |C| = 0 is plain column-row sampling. The best p is in proportion to |x_i| |dy_i|.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Kept:
    """Rows that stand for all rows.

    Attributes:
        rows: int64 (k,), indices; a drawn one may occur more than once.
        scales: float32 (k,), the factor of each.
    """

    rows: "Tensor"
    scales: "Tensor"


def choose_rows(sizes: "Tensor", count: int, generator: torch.Generator) -> Kept:
    """Choose rows; nothing waits for the device.

    Args:
        sizes: (N,), not negative: what the probabilities are in proportion to. A row of size 0 is not kept.
        count: k, 1 to N.
        generator: on the device of `sizes`.
    """
    sizes = sizes.double()
    # Rows that all are nothing are all alike.
    sizes = torch.where(sizes.sum() > 0, sizes, torch.ones_like(sizes))
    shares, order = (sizes / sizes.sum()).sort(descending=True)
    places = torch.arange(count, device=sizes.device)
    # What is left when the first 0, 1, ... k - 1 rows are winners.
    left = 1 - (shares.cumsum(0) - shares)[:count]
    winners = (left / (count - places)).argmin()
    rest = torch.where(torch.arange(len(shares), device=sizes.device) >= winners, shares, 0.0)
    mass = rest.sum()
    # With nothing left the draws are any rows, with a scale of zero.
    drawn = torch.multinomial(
        torch.where(mass > 0, rest, torch.ones_like(rest)), count, replacement=True, generator=generator
    )
    is_winner = places < winners
    picked = torch.where(is_winner, places, drawn)
    factor = mass / ((count - winners) * shares[picked].clamp_min(torch.finfo(torch.float64).tiny))
    scales = torch.where(is_winner, torch.ones_like(factor), factor)
    return Kept(order[picked], scales.float())
