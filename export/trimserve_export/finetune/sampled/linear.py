"""A linear layer whose backward has a part of the rows alone."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from trimserve_export.finetune.sampled.norms import NormCache
from trimserve_export.finetune.sampled.selection import Kept

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class SharedRows:
    """The rows kept of an input, which all layers that read this input share.

    Attributes:
        kept: which rows.
        values: the rows by dtype, so that one copy of them stands for all.
    """

    kept: Kept
    values: "dict[torch.dtype, Tensor]" = field(default_factory=dict)

    def of(self, flat: "Tensor") -> "Tensor":
        """The kept rows of the input (N, in)."""
        if flat.dtype not in self.values:
            self.values[flat.dtype] = flat.detach()[self.kept.rows]
        return self.values[flat.dtype]


@dataclass(frozen=True, slots=True)
class NormSlot:
    """Where the gradient norms of a layer's samples go.

    Attributes:
        cache: of all layers.
        layer: this one's index.
        places: of the batch's samples, int64 (B,); None: they are not known.
    """

    cache: NormCache
    layer: int
    places: "Tensor | None"

    def note(self, gradient: "Tensor") -> None:
        """Note the norms of a gradient (N, out) whose rows lie sample by sample."""
        if self.places is not None:
            by_sample = gradient.reshape(len(self.places), -1)
            self.cache.put(self.layer, self.places, torch.linalg.vector_norm(by_sample.float(), dim=1))


class SampledProduct(torch.autograd.Function):
    """x W^T + b with the exact gradients of x and b, and an unbiased one of W from the kept rows."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: "Tensor",
        weight: "Tensor",
        bias: "Tensor | None",
        shared: SharedRows,
        slot: NormSlot,
    ) -> "Tensor":
        """The product as `torch.nn.Linear` computes it."""
        ctx.slot = slot
        ctx.save_for_backward(weight, shared.of(x.flatten(0, -2)), shared.kept.rows, shared.kept.scales)
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: "Tensor") -> "tuple[Tensor | None, ...]":  # noqa: ANN401
        """Gradients of x, W and b."""
        weight, values, rows, scales = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        ctx.slot.note(flat)
        of_x = gradient @ weight if ctx.needs_input_grad[0] else None
        # A scale of half precision would overflow where the row's share is small; the product is what rounds.
        of_weight = (flat[rows] * scales[:, None]).to(flat.dtype).T @ values
        of_bias = flat.sum(0) if ctx.needs_input_grad[2] else None
        return of_x, of_weight, of_bias, None, None


def sampled_linear(
    x: "Tensor", weight: "Tensor", bias: "Tensor | None", shared: SharedRows, slot: NormSlot
) -> "Tensor":
    """`SampledProduct`, under autocast as `torch.nn.functional.linear` behaves there."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    with torch.autocast(kind, enabled=False):
        made: Tensor = SampledProduct.apply(x, weight, bias, shared, slot)  # type: ignore[no-untyped-call]
    return made
