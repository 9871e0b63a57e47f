"""The halves of a transformer layer, attention and MLP, by its class, each with an adapter beside it."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from trimserve.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

# What a model passes to a layer beside the hidden states, by name.
Inputs: TypeAlias = Mapping[str, Any]
# (layer, hidden states, inputs, adapter) -> hidden states
Half: TypeAlias = "Callable[[Any, Tensor, Inputs, Adapter | None], Tensor]"
Adapter: TypeAlias = "Callable[[Tensor], Tensor]"
_CROSS = ("encoder_hidden_states", "encoder_attention_mask")


@dataclass(frozen=True, slots=True)
class Halves:
    """A layer as attention half after MLP half: each with its residual sum and norm.

    Attributes:
        attention: with cross-attention where the layer has it.
        mlp: the rest.
        gave_tuple: the layer gives its hidden states in a tuple before transformers 5.
    """

    attention: Half
    mlp: Half
    gave_tuple: bool = False

    @property
    def gives_tuple(self) -> bool:
        """The layer gives its hidden states in a tuple."""
        import transformers

        return self.gave_tuple and int(transformers.__version__.partition(".")[0]) < 5

    def whole(self, layer: Any, hidden: "Tensor", inputs: Inputs, adapter: "Adapter | None") -> "Tensor":  # noqa: ANN401
        """The whole layer, with an adapter beside its MLP."""
        return self.mlp(layer, self.attention(layer, hidden, inputs, None), inputs, adapter)


def halves_of(layer: "nn.Module") -> Halves:
    """The halves of a layer.

    Raises:
        UnsupportedModelError: a class of layers that is not known.
    """
    name = type(layer).__name__
    if name not in LAYERS:
        raise UnsupportedModelError(
            f"reversible does not know the layers {name}: it couples {', '.join(sorted(LAYERS))}."
        )
    return LAYERS[name]


def bind_inputs(layer: "nn.Module", args: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any]:
    """What a model passed to a layer after the hidden states, by the names of the layer's `forward`."""
    bound = inspect.signature(type(layer).forward).bind(layer, None, *args, **named).arguments
    rest: dict[str, Any] = bound.pop("kwargs", {})
    return dict(list(bound.items())[2:]) | rest


def _call(module: Any, hidden: "Tensor", inputs: Inputs) -> "Tensor":  # noqa: ANN401
    """Attention's output alone; inputs that its class does not take are left out, as layers do."""
    parameters = inspect.signature(type(module).forward).parameters
    any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    made: Tensor = module(
        hidden,
        **{name: value for name, value in inputs.items() if any_name or name in parameters},
    )[0]
    return made


def _self_inputs(inputs: Inputs) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in (*_CROSS, "use_cache")}


def _beside(hidden: "Tensor", adapter: "Adapter | None") -> "Tensor":
    """The residual with the adapter's output, so that both are summed and normed with the half's own."""
    return hidden if adapter is None else hidden + adapter(hidden)


def _dropped(module: Any, hidden: "Tensor", share: float) -> "Tensor":  # noqa: ANN401
    import torch

    return torch.nn.functional.dropout(hidden, p=share, training=module.training)


def _bert_attention(layer: Any, hidden: "Tensor", inputs: Inputs, adapter: "Adapter | None") -> "Tensor":  # noqa: ANN401
    rest = _self_inputs(inputs)
    context = _call(layer.attention.self, hidden, rest)
    made: Tensor = layer.attention.output(context, _beside(hidden, adapter))
    memory = inputs.get("encoder_hidden_states")
    if memory is not None and layer.is_decoder:
        rest |= {"attention_mask": inputs.get("encoder_attention_mask"), "encoder_hidden_states": memory}
        made = layer.crossattention.output(_call(layer.crossattention.self, made, rest), made)
    return made


def _bert_mlp(layer: Any, hidden: "Tensor", _: Inputs, adapter: "Adapter | None") -> "Tensor":  # noqa: ANN401
    made: Tensor = layer.output(layer.intermediate(hidden), _beside(hidden, adapter))
    return made


def _bart_attention(layer: Any, hidden: "Tensor", inputs: Inputs, adapter: "Adapter | None") -> "Tensor":  # noqa: ANN401
    rest = _self_inputs(inputs)
    made = _dropped(layer, _call(layer.self_attn, hidden, rest), layer.dropout)
    hidden = layer.self_attn_layer_norm(_beside(hidden, adapter) + made)
    memory = inputs.get("encoder_hidden_states")
    if memory is not None:
        rest |= {"attention_mask": inputs.get("encoder_attention_mask"), "key_value_states": memory}
        made = _dropped(layer, _call(layer.encoder_attn, hidden, rest), layer.dropout)
        hidden = layer.encoder_attn_layer_norm(hidden + made)
    return hidden


def _bart_mlp(layer: Any, hidden: "Tensor", _: Inputs, adapter: "Adapter | None") -> "Tensor":  # noqa: ANN401
    inner = _dropped(layer, layer.activation_fn(layer.fc1(hidden)), layer.activation_dropout)
    made = _dropped(layer, layer.fc2(inner), layer.dropout)
    normed: Tensor = layer.final_layer_norm(_beside(hidden, adapter) + made)
    return normed


def _opt_attention(layer: Any, hidden: "Tensor", inputs: Inputs, adapter: "Adapter | None") -> "Tensor":  # noqa: ANN401
    first, norm = layer.do_layer_norm_before, layer.self_attn_layer_norm
    seen = norm(hidden) if first else hidden
    made = _dropped(layer, _call(layer.self_attn, seen, _self_inputs(inputs)), layer.dropout)
    summed: Tensor = hidden + made if adapter is None else hidden + made + adapter(seen)
    return summed if first else norm(summed)


def _opt_mlp(layer: Any, hidden: "Tensor", _: Inputs, adapter: "Adapter | None") -> "Tensor":  # noqa: ANN401
    first, norm = layer.do_layer_norm_before, layer.final_layer_norm
    seen = norm(hidden) if first else hidden
    made = _dropped(layer, layer.fc2(layer.activation_fn(layer.fc1(seen))), layer.dropout)
    summed: Tensor = hidden + made if adapter is None else hidden + made + adapter(seen)
    return summed if first else norm(summed)


def _llama_attention(layer: Any, hidden: "Tensor", inputs: Inputs, adapter: "Adapter | None") -> "Tensor":  # noqa: ANN401
    seen = layer.input_layernorm(hidden)
    made = hidden + _call(layer.self_attn, seen, inputs)
    return made if adapter is None else made + adapter(seen)


def _llama_mlp(layer: Any, hidden: "Tensor", _: Inputs, adapter: "Adapter | None") -> "Tensor":  # noqa: ANN401
    seen = layer.post_attention_layernorm(hidden)
    made: Tensor = hidden + layer.mlp(seen)
    return made if adapter is None else made + adapter(seen)


_BERT = Halves(_bert_attention, _bert_mlp, gave_tuple=True)
_BART = Halves(_bart_attention, _bart_mlp, gave_tuple=True)
_LLAMA = Halves(_llama_attention, _llama_mlp)
LAYERS = {
    "BertLayer": _BERT,
    "RobertaLayer": _BERT,
    "XLMRobertaLayer": _BERT,
    "BartEncoderLayer": _BART,
    "BartDecoderLayer": _BART,
    "OPTDecoderLayer": Halves(_opt_attention, _opt_mlp, gave_tuple=True),
    "LlamaDecoderLayer": _LLAMA,
    "MistralDecoderLayer": _LLAMA,
    "Qwen2DecoderLayer": _LLAMA,
    "Qwen3DecoderLayer": _LLAMA,
}
