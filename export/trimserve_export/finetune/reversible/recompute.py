"""Backward through a reversible stack: each step's input is recomputed from its output, then its gradient.

One autograd function spans the stack. The trained parameters are its inputs, so that their gradients
arrive in the engine once and in one place: hooks of DistributedDataParallel, gradient scaling and
accumulation see what they see of any other layer. Inside, `torch.autograd.grad` of one step at a time.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from trimserve.errors import MismatchError, UsageError
from trimserve_export.coupled.blocks import Inputs
from trimserve_export.coupled.coupling import Coupling, HalfStep
from trimserve_export.finetune.reversible.digits import Scale, snap

if TYPE_CHECKING:
    from torch import Tensor

Streams = list["Tensor"]


@dataclass(slots=True)
class Pass:
    """One forward pass through a stack, and what its backward needs.

    Attributes:
        coupling: the steps.
        inputs: what the model passes to its layers.
        exact: streams on the grid, with the digits that scales drop; otherwise floats alone.
        checkpointed: layers at the beginning whose streams are kept instead of recomputed by inversion.
        dtype: of the hidden states.
        generators: each step's random state, so that dropout is drawn alike again.
        autocast: device type, whether it is on, and dtype.
        trained: the parameters that get a gradient, and their versions.
        checksum: of the streams at the beginning, exact passes alone.
    """

    coupling: Coupling
    inputs: Inputs
    exact: bool
    checkpointed: int
    dtype: torch.dtype
    device: torch.device
    generators: list[Any] = field(default_factory=list)
    autocast: tuple[str, bool, torch.dtype] = ("cpu", False, torch.bfloat16)
    trained: "tuple[nn.Parameter, ...]" = ()
    versions: tuple[int, ...] = ()
    checksum: "Tensor | None" = None

    def begin(self, hidden: "Tensor") -> Streams:
        """Both streams, of the embeddings."""
        kind = self.device.type
        self.autocast = (kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        stream = snap(hidden) if self.exact else hidden.float()
        return [stream, stream]

    def evaluate(self, step: HalfStep, source: "Tensor", inputs: Inputs | None = None) -> "Tensor":
        """A step's function, in the streams' dtype but not yet on the grid."""
        kind, enabled, dtype = self.autocast
        # Casts of weights that are cached without a graph must not be met by the recomputation with one.
        with torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False):
            made = step.function(source.to(self.dtype), self.inputs if inputs is None else inputs)
        return made.to(source.dtype)

    def advance(self, step: HalfStep, streams: Streams) -> "Tensor | None":
        """Do a step in place; returns its digits."""
        made = self.evaluate(step, streams[step.source])
        if not self.exact:
            streams[step.target] = streams[step.target] * step.scale + made
            return None
        product, digits = Scale(step.scale).shrink(streams[step.target])
        streams[step.target] = product + snap(made)
        return digits

    def retreat(self, step: HalfStep, streams: Streams, made: "Tensor", digits: "Tensor | None") -> None:
        """Undo a step in place."""
        if self.exact:
            streams[step.target] = Scale(step.scale).expand(streams[step.target] - snap(made), digits)
        else:
            streams[step.target] = (streams[step.target] - made) / step.scale

    def is_kept(self, step: HalfStep) -> bool:
        """Whether the streams before this step are kept."""
        return step.layer < self.checkpointed

    def remember_state(self) -> None:
        """Note the random state before a step."""
        device = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        self.generators.append((torch.get_rng_state(), device))

    @contextlib.contextmanager
    def random_state(self, number: int) -> Iterator[None]:
        """The random state that a step had; the present one is back afterwards."""
        on_cpu, on_device = self.generators[number]
        devices = [] if on_device is None else [self.device]
        with torch.random.fork_rng(devices):
            torch.set_rng_state(on_cpu)
            if on_device is not None:
                torch.cuda.set_rng_state(on_device, self.device)
            yield


def checksum(streams: Streams) -> "Tensor":
    """The sums of the streams' grid integers modulo 2^64: the same in any order of addition."""
    return torch.stack([(stream * 2.0**30).to(torch.int64).sum() for stream in streams])


class RecomputedStack(torch.autograd.Function):
    """(pass, hidden states, other inputs with a gradient..., trained parameters...) -> hidden states."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        made: Pass,
        names: tuple[str, ...],
        hidden: "Tensor",
        *tensors: "Tensor",
    ) -> "Tensor":
        """Keep the last streams, the digits, and the streams of checkpointed layers."""
        streams = made.begin(hidden)
        made.versions = tuple(parameter._version for parameter in made.trained)
        if made.exact:
            made.checksum = checksum(streams)
        kept: list[Tensor | None] = []
        for step in made.coupling.steps:
            made.remember_state()
            if made.is_kept(step):
                kept += streams
            kept.append(made.advance(step, streams))
        ctx.made, ctx.names, ctx.input_dtype = made, names, hidden.dtype
        ctx.save_for_backward(*tensors[: len(names)], *streams, *kept)
        return streams[made.coupling.output].to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: "Tensor") -> "tuple[Tensor | None, ...]":  # noqa: ANN401
        """Recompute and differentiate the steps from the last to the first."""
        saved, count = list(ctx.saved_tensors), len(ctx.names)
        others, streams, kept = saved[:count], saved[count : count + 2], saved[count + 2 :]
        del saved
        walk = _Walk(ctx.made, dict(zip(ctx.names, others, strict=True)), streams, kept, gradient)
        for number in reversed(range(len(ctx.made.coupling.steps))):
            walk.back(number)
        walk.check()
        entered = [each for each in walk.gradients if each is not None]
        whole = sum(entered[1:], start=entered[0]).to(ctx.input_dtype) if ctx.needs_input_grad[2] else None
        return None, None, whole, *walk.of_tensors


class _Walk:
    """The way back: streams and their gradients at a place in the stack."""

    def __init__(
        self,
        made: Pass,
        others: "dict[str, Tensor]",
        streams: Streams,
        kept: "list[Tensor | None]",
        gradient: "Tensor",
    ) -> None:
        """Begin at the end of the stack.

        Raises:
            UsageError: parameters were changed since the forward pass.
        """
        if made.versions != tuple(parameter._version for parameter in made.trained):
            raise UsageError(
                "parameters were changed between forward and backward, so that activations cannot be "
                "recomputed: call backward() before the optimizer's step()."
            )
        self._made = made
        self._streams = streams
        self._kept = kept
        self._others = {name: tensor.detach().requires_grad_() for name, tensor in others.items()}
        self._inputs = dict(made.inputs) | self._others
        leaves = (*self._others.values(), *made.trained)
        self._places = {id(leaf): place for place, leaf in enumerate(leaves)}
        self.of_tensors: list[Tensor | None] = [None] * len(leaves)
        self.gradients: list[Tensor | None] = [None, None]
        self.gradients[made.coupling.output] = gradient.to(streams[0].dtype)

    def back(self, number: int) -> None:
        """Undo one step."""
        step = self._made.coupling.steps[number]
        digits = self._kept.pop()
        if self._made.is_kept(step):
            before = [tensor for tensor in (self._kept.pop(), self._kept.pop()) if tensor is not None]
            self._streams = before[::-1]
        source = self._streams[step.source].detach().requires_grad_()
        arriving = self.gradients[step.target]
        with self._made.random_state(number), torch.set_grad_enabled(arriving is not None):
            made = self._made.evaluate(step, source, self._inputs)
        if arriving is not None:
            if made.requires_grad:
                self._differentiate(step, source, made, arriving)
            self.gradients[step.target] = arriving * step.scale
        if not self._made.is_kept(step):
            self._made.retreat(step, self._streams, made.detach(), digits)

    def _differentiate(self, step: HalfStep, source: "Tensor", made: "Tensor", arriving: "Tensor") -> None:
        own = {id(p): p for module in step.modules for p in module.parameters() if p.requires_grad}
        leaves = [*self._others.values(), *(leaf for leaf in own.values() if id(leaf) in self._places)]
        of_source, *found = torch.autograd.grad(made, [source, *leaves], arriving, allow_unused=True)
        self.gradients[step.source] = _sum(self.gradients[step.source], of_source)
        for leaf, gradient in zip(leaves, found, strict=True):
            place = self._places[id(leaf)]
            self.of_tensors[place] = _sum(self.of_tensors[place], gradient)

    def check(self) -> None:
        """Compare the streams at the beginning with the forward pass's.

        Raises:
            MismatchError: they differ: a layer computed other numbers the second time.
        """
        expected = self._made.checksum
        if expected is None or self._made.checkpointed or torch.equal(checksum(self._streams), expected):
            return
        if all(bool(stream.isfinite().all()) for stream in self._streams):
            raise MismatchError(
                "the inversion of the reversible layers did not come back to their input: a layer computed "
                "other numbers in backward than in forward, or they are above 8,388,608. Call "
                "torch.use_deterministic_algorithms(True), or pass exact=False."
            )


def _sum(left: "Tensor | None", right: "Tensor | None") -> "Tensor | None":
    if left is None or right is None:
        return right if left is None else left
    return left + right
