"""The couplings of MEFT (Liao, Tan & Monz 2023, arXiv:2306.00477): layers as a reversible network.

A reversible layer (Gomez et al. 2017, arXiv:1707.04585) with factors has two streams and two functions:

    y1 = lambda * x1 + F(x2)        x2 = (y2 - G(y1)) / beta
    y2 = beta * x2 + G(y1)          x1 = (y1 - F(x2)) / lambda

MEFT puts a pre-trained layer in the place of F or G, so that one stream carries its hidden states; the
factor of that stream is small (0.1), so that the model starts near the pre-trained one. Its three variants
(figure 4):

    1   F the layer with an adapter, G an adapter       lambda 0.1, beta 1     then streams are swapped
    2   F an adapter, G the layer with an adapter       lambda 1,   beta 0.1   then streams are swapped
    3   F attention with an adapter, G MLP with one     lambda 0.1, beta 0.1

Both streams begin as the embeddings; the output is the stream of the pre-trained hidden states.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from msgspec import Meta

from trimserve_export.coupled.blocks import Halves, Inputs

if TYPE_CHECKING:
    from torch import Tensor, nn

Variant: TypeAlias = Literal[1, 2, 3]
# Below it, what a stream's rounding drops does not fit into a byte (see finetune/reversible/digits.py).
Factor: TypeAlias = Annotated[float, Meta(ge=1 / 250, le=1)]
# (lambda, beta)
SCALES: dict[int, tuple[float, float]] = {1: (0.1, 1.0), 2: (1.0, 0.1), 3: (0.1, 0.1)}
ADAPTERS_A_LAYER = 2


@dataclass(frozen=True, slots=True)
class Form:
    """How the layers of a model are coupled.

    Attributes:
        variant: 1, 2 or 3.
        scales: lambda and beta.
        rank: width of the adapters.
    """

    variant: Variant
    scales: tuple[Factor, Factor]
    rank: Annotated[int, Meta(ge=1)]


@dataclass(frozen=True, slots=True)
class HalfStep:
    """streams[target] = scale * streams[target] + function(streams[1 - target]).

    Attributes:
        layer: index of the pre-trained layer it belongs to.
        target: which of the two streams it changes; it reads the other.
        scale: that stream's factor.
        function: of hidden states and what the model passes to its layers.
        modules: what has the function's parameters.
    """

    layer: int
    target: int
    scale: float
    function: "Callable[[Tensor, Inputs], Tensor]"
    modules: "tuple[nn.Module, ...]"

    @property
    def source(self) -> int:
        """The stream it reads."""
        return 1 - self.target


@dataclass(frozen=True, slots=True)
class Coupling:
    """The steps of a stack in order, two a layer.

    Attributes:
        steps: the steps.
        output: the stream that ends as the pre-trained model's hidden states.
    """

    steps: tuple[HalfStep, ...]
    output: int


def couple(
    layers: "Sequence[nn.Module]",
    adapters: "Sequence[nn.Module]",
    halves: Halves,
    form: Form,
) -> Coupling:
    """The steps of a stack of layers.

    Args:
        layers: the pre-trained layers.
        adapters: two a layer: F's, then G's.
        halves: of these layers.
        form: the variant and its factors.
    """
    steps: list[HalfStep] = []
    first = 0  # the stream that is called x1; a swap is another name
    for number, layer in enumerate(layers):
        pair = adapters[ADAPTERS_A_LAYER * number : ADAPTERS_A_LAYER * (number + 1)]
        functions = _functions(form.variant, layer, halves, pair)
        for place, (function, modules) in enumerate(functions):
            target = first if place == 0 else 1 - first
            steps.append(HalfStep(number, target, form.scales[place], function, modules))
        first = first if form.variant == 3 else 1 - first
    # After a swap the pre-trained stream is x2 in the first variant, x1 in the second; without one it is y2.
    return Coupling(tuple(steps), first if form.variant == 2 else 1 - first)


def _functions(
    variant: int, layer: "nn.Module", halves: Halves, adapters: "Sequence[nn.Module]"
) -> "list[tuple[Callable[[Tensor, Inputs], Tensor], tuple[nn.Module, ...]]]":
    of_f, of_g = adapters
    if variant == 1:
        return [
            (lambda x, inputs: halves.whole(layer, x, inputs, of_f), (layer, of_f)),
            (lambda x, _: of_g(x), (of_g,)),
        ]
    if variant == 2:
        return [
            (lambda x, _: of_f(x), (of_f,)),
            (lambda x, inputs: halves.whole(layer, x, inputs, of_g), (layer, of_g)),
        ]
    return [
        (lambda x, inputs: halves.attention(layer, x, inputs, of_f), (layer, of_f)),
        (lambda x, inputs: halves.mlp(layer, x, inputs, of_g), (layer, of_g)),
    ]
