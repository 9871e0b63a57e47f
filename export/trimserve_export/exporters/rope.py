"""Rotary frequencies that depend on the length of the text: part of the graph, not a constant of the trace.

transformers swaps them in Python, by the largest position it is given (longrope: one of two sets; dynamic
NTK: a new set for every length beyond the trained one). A tracer sees the length of its example alone.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from trimserve.errors import UnsupportedModelError
from trimserve_export.checkpoint.lengths import DYNAMIC, LONGROPE, length_rope, original_length


@contextlib.contextmanager
def rope_by_length(model: PreTrainedModel) -> Iterator[None]:
    """Trace a model with frequencies that follow the positions it is fed.

    Raises:
        UnsupportedModelError: its config asks for such frequencies, and its classes compute them in a way
            that is not known here.
    """
    rope = length_rope(model.config)
    if rope is None:
        yield
        return
    modules = [module for module in model.modules() if _follows_length(module)]
    if not modules:
        raise UnsupportedModelError(
            f"this {model.config.model_type!r} model changes its rotary frequencies beyond "
            f"{rope.unchanged:,} tokens ({rope.kind}) in code of its own: no graph of it would be "
            "right at every length."
        )
    for module in modules:
        module.forward = _forward_of(module)
    try:
        yield
    finally:
        for module in modules:
            del module.forward


def _follows_length(module: nn.Module) -> bool:
    kinds = getattr(module, "rope_type", None)
    kinds = list(kinds.values()) if isinstance(kinds, dict) else [kinds]
    if not any(_changes(kind) for kind in kinds):
        return False
    return "position_ids" in inspect.signature(inspect.unwrap(type(module).forward)).parameters


def _changes(kind: object) -> bool:
    return isinstance(kind, str) and (kind == LONGROPE or DYNAMIC in kind)


class _With:
    """A module as its forward sees it, some attributes replaced: a trace may not assign to the module."""

    def __init__(self, module: nn.Module, values: dict[str, Any]) -> None:
        self._module, self._values = module, values

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - stands for any attribute
        return self._values[name] if name in self._values else getattr(self._module, name)


def _forward_of(module: nn.Module) -> Callable[..., Any]:
    plain = inspect.unwrap(type(module).forward)  # without transformers' swapping around it

    def forward(x: torch.Tensor, position_ids: torch.Tensor, layer_type: str | None = None) -> Any:  # noqa: ANN401
        extra = {} if layer_type is None else {"layer_type": layer_type}
        kinds: Any = module.rope_type
        kind = kinds[layer_type] if isinstance(kinds, dict) else kinds
        if not _changes(kind):
            return plain(module, x, position_ids, **extra)
        prefix = "" if layer_type is None else f"{layer_type}_"
        frequencies = _frequencies(module, kind, prefix, position_ids.max() + 1, extra)
        return plain(_With(module, {f"{prefix}inv_freq": frequencies}), x, position_ids, **extra)

    return torch.no_grad()(forward)


def _frequencies(
    module: nn.Module, kind: str, prefix: str, length: torch.Tensor, extra: dict[str, str]
) -> torch.Tensor:
    config: Any = module.config
    original: torch.Tensor = getattr(module, f"{prefix}original_inv_freq")
    make: Callable[..., Any] = ROPE_INIT_FUNCTIONS[kind]
    if kind == LONGROPE:
        sets = getattr(config, "rope_parameters", None) or config.rope_scaling
        unchanged = original_length(config, sets[extra["layer_type"]] if extra else sets)
        other, _ = make(config, original.device, seq_len=unchanged + 1, **extra)
    else:
        unchanged = config.max_position_embeddings
        other, _ = make(config, original.device, seq_len=length, **extra)
    return torch.where(length > unchanged, other, original)
