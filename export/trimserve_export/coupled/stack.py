"""`CoupledStack`: stands in for a model's list of layers, and runs them coupled."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from trimserve_export.coupled.adapter import BottleneckAdapter
from trimserve_export.coupled.blocks import bind_inputs, halves_of
from trimserve_export.coupled.coupling import ADAPTERS_A_LAYER, Coupling, Form, couple

if TYPE_CHECKING:
    from torch import Tensor


class CoupledStack(nn.ModuleList):
    """A list of layers that gives itself, once, to the loop that runs over it.

    The layers keep their names in the model ("0", "1", ...), so checkpoints and adapters of PEFT find them;
    the adapters are beside them ("adapters"). This is the inference form: plain operations on floats, which
    exporters trace.

    Attributes:
        form: how they are coupled.
    """

    def __init__(self, layers: nn.ModuleList, form: Form, width: int) -> None:
        super().__init__()
        self._modules.update(layers._modules)
        self.training = layers.training
        first = next(layers[0].parameters())
        made = [BottleneckAdapter(width, form.rank) for _ in range(ADAPTERS_A_LAYER * len(layers))]
        self.adapters = nn.ModuleList(made).to(first.device, first.dtype).train(layers.training)
        self.form = form
        # The loops of some models ask their layers for this.
        kinds = {getattr(layer, "attention_type", None) for layer in layers}
        if kinds != {None}:
            self.attention_type = kinds.pop()

    @property
    def layers(self) -> list[nn.Module]:
        """The pre-trained layers."""
        return [module for name, module in self._modules.items() if name.isdigit() and module is not None]

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Any]:
        return iter((self,))

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401 - an index or a slice, as of a list
        return (self,)[index] if isinstance(index, slice) else self.layers[index]

    def coupling(self) -> Coupling:
        """The steps, of the modules that are here now (a copy of the model has its own)."""
        layers = self.layers
        return couple(layers, list(self.adapters), halves_of(layers[0]), self.form)

    def forward(self, hidden_states: "Tensor", *args: Any, **named: Any) -> Any:  # noqa: ANN401 - the layer's own
        """Run all layers; takes and gives what one of them takes and gives."""
        first = self.layers[0]
        made = self.run(hidden_states, bind_inputs(first, args, named))
        return (made,) if halves_of(first).gives_tuple else made

    def run(self, hidden: "Tensor", inputs: dict[str, Any]) -> "Tensor":
        """The hidden states after the last layer."""
        coupling = self.coupling()
        streams = [hidden, hidden]
        for step in coupling.steps:
            made = step.function(streams[step.source], inputs)
            streams[step.target] = streams[step.target] * step.scale + made
        return streams[coupling.output]
