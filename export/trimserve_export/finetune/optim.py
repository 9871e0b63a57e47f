"""An optimizer's state while the rows it belongs to are cut off and given back."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trimserve.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer


@dataclass(frozen=True, slots=True)
class Replaced:
    """A parameter that took another's place.

    Attributes:
        name: its name in the model.
        axis: the vocab axis.
        old: what the optimizer holds.
        new: what it should hold.
    """

    name: str
    axis: int
    old: "Tensor"
    new: "Tensor"


# (name of the state, its tensor, the replaced parameter) -> the tensor with the new parameter's rows.
Convert = Callable[[str, "Tensor", Replaced], "Tensor"]


def check_state(optimizer: "Optimizer", parameters: "Iterable[Tensor]") -> None:
    """Refuse state that has no row for each row of its parameter, before anything is changed.

    Raises:
        UsageError: a factored or quantised state (Adafactor, 8-bit Adam).
    """
    for parameter in parameters:
        for key, value in optimizer.state.get(parameter, {}).items():
            if not (_has_rows(value, parameter) or _is_number(value)):
                raise UsageError(
                    f"{type(optimizer).__name__}'s state {key!r} is not made of rows as its parameter is, so "
                    "it cannot be carried along: make the optimizer inside the block."
                )


def replace_parameters(optimizer: "Optimizer", replaced: Iterable[Replaced], convert: Convert) -> None:
    """Put new parameters in the place of old ones, in groups and state.

    Args:
        optimizer: any torch optimizer, also as accelerate wraps it.
        replaced: what took whose place; parameters that the optimizer has not got are passed over.
        convert: gives each state tensor its new rows.
    """
    by_old: Mapping[int, Replaced] = {id(change.old): change for change in replaced}
    for group in optimizer.param_groups:
        group["params"] = [by_old[id(held)].new if id(held) in by_old else held for held in group["params"]]
    for change in by_old.values():
        state: dict[str, Any] | None = optimizer.state.pop(change.old, None)
        if state is not None:
            optimizer.state[change.new] = {
                key: convert(key, value, change) if _has_rows(value, change.old) else value
                for key, value in state.items()
            }


def _has_rows(value: Any, parameter: "Tensor") -> bool:  # noqa: ANN401 - whatever an optimizer keeps
    return getattr(value, "shape", None) == parameter.shape and value.is_floating_point()


def _is_number(value: Any) -> bool:  # noqa: ANN401
    return not hasattr(value, "numel") or value.numel() == 1
