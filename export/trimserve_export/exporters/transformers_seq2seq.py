"""Export an encoder-decoder with transformers' exporter: two graphs, of the form that the runtime serves.

The exporter's own graphs have the encoder in none of them. Here two modules over one model are traced, whose
inputs and outputs are plain tensors in an order of ours: every cache is known by its place, whatever a
version of transformers calls it. The encoder also projects its hidden states for each layer's
cross-attention; the decoder takes those, a past of any length, 0 too, and any number of tokens.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from trimserve_export.exporters.axes import name_axes
from trimserve_export.exporters.tracing import write_graph

# Sizes of the example: all different, and none of them 0 or 1, which torch.export takes for constants.
_BATCH, _SOURCE, _CACHED, _FED = 2, 5, 4, 3
# Model types whose graphs were compared with torch. Others look at lengths in Python while they are traced,
# as local and block-sparse attention do, or route tokens to experts: a graph may be wrong without a word.
COMPARED = frozenset(
    {
        "bart",
        "blenderbot",
        "blenderbot-small",
        "m2m_100",
        "marian",
        "mbart",
        "mt5",
        "pegasus",
        "plbart",
        "t5",
        "umt5",
    }
)
_CACHE_KINDS = ("key", "value")
_AXES = {
    "input_ids": ("batch_size", "sequence_length"),
    "attention_mask": ("batch_size", "sequence_length"),
    "encoder_attention_mask": ("batch_size", "encoder_sequence_length"),
    "encoder": ("batch_size", None, "encoder_sequence_length", None),
    "decoder": ("batch_size", None, "past_sequence_length", None),
}

# Of a module, its inputs by name, and of each input the axes that vary: the graph.
Tracer = Callable[[nn.Module, dict[str, Any], dict[str, Any]], ir.Model]


def export_pair(model: PreTrainedModel, output: Path, trace: Tracer) -> Path:
    """Write `encoder_model.onnx` and `decoder_model.onnx`.

    Args:
        model: an encoder-decoder with a head.
        output: the folder to write into.
        trace: makes the graph of a module.

    Returns:
        `output`.
    """
    example = _Example(model)
    encoder = _traced(trace, _Encoder(model), example.of_encoder(), example.encoder_outputs)
    decoder = _traced(trace, _Decoder(model, example.width), example.of_decoder(), example.decoder_outputs)
    write_graph(encoder, output / "encoder_model.onnx")
    write_graph(decoder, output / "decoder_model.onnx")
    return output


class _Encoder(nn.Module):
    """Source ids and their mask -> hidden states, and keys and values of each layer's cross-attention."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model: Any = model
        self.config = model.config

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        hidden = self.model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask)[0]
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        # What the decoder makes of a token besides is of no output, and falls away.
        self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
            attention_mask=attention_mask,
            decoder_input_ids=input_ids[:, :1],
            past_key_values=cache,
            use_cache=True,
        )
        return (hidden, *_tensors(cache.cross_attention_cache))


class _Decoder(nn.Module):
    """Ids, the source's mask and the caches -> logits, and each layer's own keys and values."""

    def __init__(self, model: PreTrainedModel, width: int) -> None:
        super().__init__()
        self.model: Any = model
        self.config = model.config
        self.width = width

    def forward(
        self,
        input_ids: torch.Tensor,
        encoder_attention_mask: torch.Tensor,
        own: list[torch.Tensor],
        cross: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        cache = EncoderDecoderCache(_cache(own), _cache(cross))
        cache.is_updated = dict.fromkeys(range(len(cross) // 2), True)
        # Models ask for the hidden states only to see that there is a source, and its size.
        hidden: Any = cross[0].new_zeros(*encoder_attention_mask.shape, self.width)
        logits = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden),
            attention_mask=encoder_attention_mask,
            decoder_input_ids=input_ids,
            past_key_values=cache,
            use_cache=True,
        ).logits
        return (logits, *_tensors(cache.self_attention_cache))


def _tensors(cache: DynamicCache) -> list[torch.Tensor]:
    """Keys and values of each layer."""
    layers: list[Any] = cache.layers
    return [tensor for layer in layers for tensor in (layer.keys, layer.values)]


def _cache(tensors: list[torch.Tensor]) -> DynamicCache:
    """A cache that keeps all positions: the reverse of `_tensors`."""
    cache = DynamicCache()
    for layer, keys in enumerate(tensors[::2]):
        cache.update(keys, tensors[2 * layer + 1], layer)
    return cache


class _Example:
    """What the modules are traced with; the second source has a padded position.

    Attributes:
        width: of the encoder's hidden states.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._rows: int = model.config.get_text_config().vocab_size
        self._mask = torch.ones(_BATCH, _SOURCE, dtype=torch.int64)
        self._mask[1, -1] = 0
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        made = model(
            input_ids=self._ids(_SOURCE),
            attention_mask=self._mask,
            decoder_input_ids=self._ids(_CACHED),
            past_key_values=cache,
            use_cache=True,
        )
        self.width = made.encoder_last_hidden_state.shape[-1]
        self._own, self._cross = _tensors(cache.self_attention_cache), _tensors(cache.cross_attention_cache)

    @property
    def encoder_outputs(self) -> list[str]:
        """Names, in the module's order."""
        return ["last_hidden_state", *_names("present", "encoder", self._cross)]

    @property
    def decoder_outputs(self) -> list[str]:
        """Names, in the module's order."""
        return ["logits", *_names("present", "decoder", self._own)]

    def of_encoder(self) -> dict[str, Any]:
        """Inputs of `_Encoder`, in its order."""
        return {"input_ids": self._ids(_SOURCE), "attention_mask": self._mask}

    def of_decoder(self) -> dict[str, Any]:
        """Inputs of `_Decoder`, in its order."""
        ids = self._ids(_FED)
        caches = {"own": self._own, "cross": self._cross}
        return {"input_ids": ids, "encoder_attention_mask": self._mask} | caches

    def _ids(self, length: int) -> torch.Tensor:
        return torch.arange(_BATCH * length).remainder(self._rows).reshape(_BATCH, length)


def _names(kind: str, part: str, caches: list[torch.Tensor]) -> list[str]:
    layers = range(len(caches) // 2)
    return [f"{kind}.{layer}.{part}.{name}" for layer in layers for name in _CACHE_KINDS]


def _traced(trace: Tracer, module: nn.Module, example: dict[str, Any], outputs: list[str]) -> ir.Model:
    """The graph of a module, its inputs, outputs and axes named as other exporters do."""
    program = trace(module.eval(), example, {name: _varying(value) for name, value in example.items()})
    graph = program.graph
    inputs: list[str] = []
    for name, value in example.items():
        part = {"own": "decoder", "cross": "encoder"}.get(name)
        inputs += [name] if part is None else _names("past_key_values", part, value)
    for value, name in zip((*graph.inputs, *graph.outputs), (*inputs, *outputs), strict=True):
        value.name = name
    name_axes(graph, _axes_of)
    return program


def _axes_of(name: str) -> Sequence[str | None]:
    return _AXES[name.split(".")[-2] if "." in name else name]


def _varying(value: torch.Tensor | list[torch.Tensor]) -> Any:  # noqa: ANN401 - as torch.export takes it
    """The axes of an input that vary: the batch, and positions."""
    if isinstance(value, list):
        return [_varying(tensor) for tensor in value]
    auto = torch.export.Dim.AUTO
    return {0: auto, 2: auto} if value.ndim == 4 else {0: auto, 1: auto}
