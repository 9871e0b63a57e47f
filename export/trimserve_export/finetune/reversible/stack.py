"""`ReversibleStack`: coupled layers in training, whose activations backward recomputes."""

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from trimserve.errors import UnsupportedModelError, UsageError
from trimserve_export.coupled.blocks import bind_inputs, halves_of
from trimserve_export.coupled.coupling import Form
from trimserve_export.coupled.stack import CoupledStack
from trimserve_export.finetune.reversible.digits import snap
from trimserve_export.finetune.reversible.recompute import Pass, RecomputedStack

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)
_CACHE = "past_key_values"


class ReversibleStack(CoupledStack):
    """A stack of which backward keeps the last streams alone, and the digits that the factors drop.

    Attributes:
        exact: see `Pass`.
        checkpointed: see `Pass`; None: measured in the first pass with gradients.
        tolerance: relative error of an inverted stream above which layers are checkpointed instead.
        recompute: False keeps every activation, as an ordinary model does: the same numbers, for comparison.
        inversion_errors: after a measurement, each layer's error of the streams that it began with.
    """

    def __init__(self, layers: nn.ModuleList, form: Form, width: int) -> None:
        super().__init__(layers, form, width)
        self.exact = True
        self.checkpointed: int | None = None
        self.tolerance = 1e-5
        self.recompute = True
        self.inversion_errors: tuple[float, ...] = ()
        self._was_tried = False

    def forward(self, hidden_states: "Tensor", *args: Any, **named: Any) -> Any:  # noqa: ANN401 - the layer's own
        """Run all layers; takes and gives what one of them takes and gives."""
        if not self._was_tried:
            self._try_out(hidden_states, args, named)
            self._was_tried = True
        return super().forward(hidden_states, *args, **named)

    def run(self, hidden: "Tensor", inputs: dict[str, Any]) -> "Tensor":
        """The hidden states after the last layer, by recomputation where a gradient is wanted."""
        made = Pass(self.coupling(), inputs, self.exact, self.checkpointed or 0, hidden.dtype, hidden.device)
        names = tuple(name for name, value in inputs.items() if _has_gradient(value))
        made.trained = tuple(parameter for parameter in self.parameters() if parameter.requires_grad)
        if not (torch.is_grad_enabled() and (made.trained or names or hidden.requires_grad)):
            return _run_differentiable(made, hidden)
        made.inputs = _without_cache(inputs)
        if not self.recompute:
            return _run_differentiable(made, hidden)
        if not self.exact and self.checkpointed is None:
            self._measure(made, hidden)
        tensors = [*(inputs[name] for name in names), *made.trained]
        return RecomputedStack.apply(made, names, hidden, *tensors)  # type: ignore[no-any-return,no-untyped-call]

    def _measure(self, made: Pass, hidden: "Tensor") -> None:
        """Invert a pass, compare with what it was, and checkpoint the layers that the error reaches."""
        with torch.no_grad(), torch.random.fork_rng([hidden.device] if hidden.is_cuda else []):
            streams, before = made.begin(hidden), []
            for step in made.coupling.steps:
                made.remember_state()
                before.append(list(streams))
                made.advance(step, streams)
            errors = [0.0] * len(self.layers)
            for number, step in reversed(list(enumerate(made.coupling.steps))):
                with made.random_state(number):
                    made.retreat(step, streams, made.evaluate(step, streams[step.source]), None)
                errors[step.layer] = max(map(_relative, streams, before[number]))
        made.generators.clear()
        self.inversion_errors = tuple(errors)
        lost = [number for number, error in enumerate(errors) if not error <= self.tolerance]
        self.checkpointed = made.checkpointed = max(lost, default=-1) + 1
        if lost:
            logger.warning(
                "inversion in floats loses digits (relative error %.1e at the first layer, %.0e allowed): "
                "the first %d of %d layers are checkpointed instead. Pass exact=True to keep the digits.",
                errors[0],
                self.tolerance,
                self.checkpointed,
                len(errors),
            )

    def _try_out(self, hidden: "Tensor", args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Compare the halves of the first layer with the layer, which no version of transformers promises.

        Raises:
            UsageError: something is hooked on a layer.
            UnsupportedModelError: they differ.
        """
        layer = self.layers[0]
        if any(
            each._forward_hooks or each._forward_pre_hooks or "forward" in vars(each) for each in self.layers
        ):
            raise UsageError(
                "something is hooked on a whole layer, which reversible does not call: make the model "
                "reversible before other tools take hold of its layers."
            )
        named = {name: value for name, value in named.items() if name != _CACHE}
        halves, modes = halves_of(layer), {module: module.training for module in layer.modules()}
        layer.eval()
        try:
            with torch.no_grad():
                made = layer(hidden, *args, **named)
                found = halves.whole(layer, hidden, bind_inputs(layer, args, named), None)
        finally:
            for module, training in modes.items():
                module.training = training
        expected = made[0] if halves.gives_tuple else made
        same = isinstance(made, tuple) == halves.gives_tuple and expected.shape == found.shape
        if not (
            same and torch.allclose(found.float(), expected.float(), rtol=1e-3, atol=1e-3, equal_nan=True)
        ):
            raise UnsupportedModelError(
                f"{type(layer).__name__} of this version of transformers computes something else than its "
                "attention and MLP after each other: reversible cannot couple it."
            )


def _run_differentiable(made: Pass, hidden: "Tensor") -> "Tensor":
    """The pass's numbers by ordinary operations; rounding to the grid counts as none in their gradient."""
    streams = made.begin(hidden)
    if made.exact:
        streams = [_pass_through(hidden.double())] * 2
    for step in made.coupling.steps:
        function = made.evaluate(step, streams[step.source])
        scaled = streams[step.target] * step.scale
        if made.exact:
            function, scaled = _pass_through(function), _pass_through(scaled)
        streams[step.target] = scaled + function
    return streams[made.coupling.output].to(hidden.dtype)


def _pass_through(values: "Tensor") -> "Tensor":
    """`snap` with the gradient of the identity; the sum is exact, as the two are within a factor of two."""
    with torch.no_grad():
        difference = snap(values) - values
    return values + difference


def _without_cache(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a pass that is recomputed: no keys and values are stored twice.

    Raises:
        UsageError: there are some already.
    """
    cache = inputs.get(_CACHE)
    if cache is None:
        return inputs
    if cache.get_seq_length():
        raise UsageError("a reversible model is trained without past_key_values: leave them out.")
    return inputs | {_CACHE: None}


def _has_gradient(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, torch.Tensor) and value.requires_grad


def _relative(found: "Tensor", expected: "Tensor") -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(expected.dtype).tiny))
