"""Rotary positions that a model multiplies as complex numbers (Llama 4, DeepSeek V2), in real arithmetic.

ONNX has no operators for complex tensors. The code is traced as it is, with pairs of real tensors where torch
would make complex ones. Llama 4 also scales queries by where a token lies in the cache, padding included; a
batch is to give what each text gives alone, so the scale follows the positions that the graph is fed.
"""

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

import torch
from torch import nn
from transformers import PreTrainedModel

_MADE_BY: Final = "view_as_complex"
# The name by which modules of transformers know it.
_TORCH: Final = "torch"


@contextlib.contextmanager
def real_rotation(model: PreTrainedModel) -> Iterator[None]:
    """Trace complex products of a model's classes as real ones; other models as they are."""
    modules = {sys.modules[type(part).__module__] for part in model.modules()}
    complexes = [module for module in modules if _is_complex(module)]
    scaled = [part for part in model.modules() if _scales_by_place(getattr(part, "self_attn", None))]
    for module in complexes:
        setattr(module, _TORCH, _RealTorch(_TORCH))
    removals = [remove for part in scaled for remove in _scale_by_position(part)]
    try:
        yield
    finally:
        for module in complexes:
            setattr(module, _TORCH, torch)
        for remove in removals:
            remove()


@dataclass(frozen=True, slots=True)
class Pair:
    """A complex tensor as two real ones, with what rotary code does with it.

    Attributes:
        real: of any shape.
        imaginary: of that shape.
    """

    real: torch.Tensor
    imaginary: torch.Tensor

    @property
    def device(self) -> torch.device:
        """Where both are."""
        return self.real.device

    def __mul__(self, other: "Pair | float") -> "Pair":
        """The product with complex or real numbers."""
        if not isinstance(other, Pair):
            return Pair(self.real * other, self.imaginary * other)
        return Pair(
            self.real * other.real - self.imaginary * other.imaginary,
            self.real * other.imaginary + self.imaginary * other.real,
        )

    def __getitem__(self, place: Any) -> "Pair":  # noqa: ANN401 - whatever indexes a tensor
        """A part of both."""
        return Pair(self.real[place], self.imaginary[place])

    def to(self, *wanted: Any, **options: Any) -> "Pair":  # noqa: ANN401 - as of a tensor
        """Both on another device."""
        return Pair(self.real.to(*wanted, **options), self.imaginary.to(*wanted, **options))

    def unsqueeze(self, axis: int) -> "Pair":
        """Both with another axis."""
        return Pair(self.real.unsqueeze(axis), self.imaginary.unsqueeze(axis))


class _RealTorch(ModuleType):
    """torch as a module of transformers sees it, with pairs instead of complex tensors."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - stands for all of torch
        return getattr(torch, name)

    @staticmethod
    def polar(size: torch.Tensor, angle: torch.Tensor) -> Pair:
        return Pair(size * angle.cos(), size * angle.sin())

    @staticmethod
    def view_as_complex(numbers: torch.Tensor) -> Pair:
        return Pair(numbers[..., 0], numbers[..., 1])

    @staticmethod
    def view_as_real(numbers: Pair) -> torch.Tensor:
        return torch.stack([numbers.real, numbers.imaginary], dim=-1)


def _is_complex(module: ModuleType) -> bool:
    functions = filter(inspect.isfunction, vars(module).values())
    return any(_MADE_BY in function.__code__.co_names for function in functions)


def _scales_by_place(attention: object) -> bool:
    """Whether it is a Llama 4 attention that scales its queries, which have no rotation then."""
    tuned = bool(getattr(attention, "attn_temperature_tuning", False))
    return tuned and not getattr(attention, "use_rope", True)


def _scale_by_position(layer: Any) -> list[Callable[[], None]]:  # noqa: ANN401 - one with such an attention
    """Scale a layer's queries by the positions it is fed; gives what undoes that.

    A query is not normalised in such a layer, so that its projection can be scaled.
    """
    attention = layer.self_attn
    tuned = attention.attn_temperature_tuning
    fed: list[torch.Tensor] = []

    def note(_: nn.Module, __: Any, named: dict[str, Any]) -> None:  # noqa: ANN401
        fed[:] = [named["position_ids"]]

    def scale(_: nn.Module, __: Any, query: torch.Tensor) -> torch.Tensor:  # noqa: ANN401
        step = torch.floor((fed[0].float() + 1.0) / attention.floor_scale)
        scales: torch.Tensor = torch.log1p(step) * attention.attn_scale + 1.0
        return (query * scales[..., None]).to(query.dtype)

    def restore() -> None:
        attention.attn_temperature_tuning = tuned

    attention.attn_temperature_tuning = False
    before = layer.register_forward_pre_hook(note, with_kwargs=True)
    behind = attention.q_proj.register_forward_hook(scale)
    return [before.remove, behind.remove, restore]
