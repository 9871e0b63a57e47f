"""The adapter of MEFT, figure 4: down, ReLU, up, and nothing at the beginning."""

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

_DEVIATION = 0.02


class BottleneckAdapter(nn.Module):
    """up(relu(down(x))), (..., H) -> (..., H).

    The paper draws both matrices from N(0, 0.02^2); here `up` begins as zero, as in LoRA, so that the
    factors of the coupling alone say how far from the pre-trained model the training starts.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, rank)
        self.up = nn.Linear(rank, width)
        nn.init.normal_(self.down.weight, std=_DEVIATION)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, hidden: "Tensor") -> "Tensor":
        """The correction of hidden states."""
        made: Tensor = self.up(nn.functional.relu(self.down(hidden)))
        return made
