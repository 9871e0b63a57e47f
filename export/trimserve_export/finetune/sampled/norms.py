"""The gradient norms of the previous epoch, a number for each linear layer and sample, on the CPU.

WTA-CRS draws rows before their gradients are known, so it takes those of the last time that the sample was
seen (arXiv:2305.15265, section 4). A sample is known by its token ids, so no data loader has to number them:
the place of its norms is a hash. Two samples in one place only make a probability worse, never the estimate
biased.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

_ODD = 0x5851F42D4C957F2D  # Knuth's multiplier of MMIX
# A cached norm is never less than this part of the mean: a gradient that was zero may not be so again.
_LEAST = 0.01


def sample_places(ids: "Tensor", mask: "Tensor | None", places: int) -> "Tensor":
    """The place of each text of a batch, the same however it is padded: int64 (B,), on the CPU.

    Args:
        ids: integers (B, T).
        mask: (B, T), 0 at padding; None: there is none.
        places: how many there are.
    """
    numbers = ids.detach().cpu().long() + 1
    seen = torch.ones_like(numbers) if mask is None or mask.shape != ids.shape else mask.cpu().long()
    powers = torch.full((numbers.shape[-1],), _ODD, dtype=torch.long).cumprod(0)  # modulo 2^64
    rank = (seen.cumsum(-1) - 1).clamp_min(0)
    summed = (numbers * seen * powers[rank]).sum(-1)
    return (summed ^ (summed >> 29)).remainder(places)


class NormCache:
    """Norms by layer and place; 0 where nothing was seen."""

    def __init__(self, layers: int, places: int) -> None:
        self._norms = torch.zeros((layers, places), dtype=torch.bfloat16)

    @property
    def places(self) -> int:
        """How many samples have a place of their own."""
        return self._norms.shape[1]

    def get(self, layers: Sequence[int], places: "Tensor") -> "Tensor":
        """The samples' norms over some layers that share their rows; ones where no sample was seen.

        Returns:
            float32 (B,), above 0.
        """
        norms = self._norms[list(layers)][:, places].float().norm(dim=0)
        known = norms[norms > 0]
        if not len(known):
            return torch.ones_like(norms)
        mean = known.mean()
        return torch.where(norms > 0, norms.clamp_min(_LEAST * mean), mean)

    def put(self, layer: int, places: "Tensor", norms: "Tensor") -> None:
        """Note a step's norms, float (B,); what is no number is left out."""
        norms = norms.detach().cpu()
        finite = norms.isfinite()
        self._norms[layer, places[finite]] = norms[finite].bfloat16()
