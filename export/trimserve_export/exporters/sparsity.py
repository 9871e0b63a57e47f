"""Gemma 3n's sparse activations: a quantile that ONNX cannot compute, as a number."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from transformers import PreTrainedModel

_METHOD: Final = "_gaussian_topk"


@contextlib.contextmanager
def sparse_by_constant(model: PreTrainedModel) -> Iterator[None]:
    """Trace such layers with their quantile computed before; other models as they are."""
    sparse: list[Any] = [part for part in model.modules() if hasattr(part, _METHOD)]
    for part in sparse:
        setattr(part, _METHOD, _above(float(part.activation_sparsity)))
    try:
        yield
    finally:
        for part in sparse:
            delattr(part, _METHOD)


def _above(share: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Keep what lies above the quantile `share` of a row, were its numbers normally distributed."""
    # In float32, as transformers has it.
    normal: Any = torch.distributions.Normal(0, 1)
    quantile: float = normal.icdf(torch.tensor(share, dtype=torch.float32)).item()

    def above(rows: torch.Tensor) -> torch.Tensor:
        deviation, mean = torch.std_mean(rows, dim=-1, keepdim=True, correction=0)
        return torch.relu(rows - (mean + deviation * quantile))

    return above
