"""Layers with a state of a fixed size instead of keys and values: short convolutions, linear attention.

transformers has two ways through such a layer, one for prompts and one for single tokens, chosen in Python by
the number of tokens, and loops over chunks of a prompt: a tracer would keep one way and one length. Here each
becomes one operator of ONNX Runtime that takes any number of tokens after any state (`CausalConvWithState`,
`LinearAttention`), and the states are inputs and outputs of the graph like keys and values.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeAlias

import torch
import torch.onnx.ops
from transformers import DynamicCache, PreTrainedModel, cache_utils

from trimserve.errors import UnsupportedModelError

# A Cache of transformers 5.
Cache: TypeAlias = Any
# Functions that transformers' classes call.
_CONV: Final = "causal_conv1d_fn"
_DELTA: Final = "torch_chunk_gated_delta_rule"
# What transformers adds below the root when it normalises queries and keys.
_L2_EPSILON: Final = 1e-6
# transformers 4 has no such layers.
_Layer: Any = getattr(cache_utils, "LinearAttentionLayer", object)


class StateLayer(_Layer):  # type: ignore[misc]
    """What transformers' cache has for one layer, as a tracer can follow it: nothing is written in place."""

    def __init__(self, conv: torch.Tensor, recurrent: torch.Tensor | None) -> None:
        """Hold the states after a text.

        Args:
            conv: (B, channels, kernel - 1), the convolution's last inputs.
            recurrent: float32 (B, heads, key size, value size); None without linear attention.
        """
        super().__init__()
        self.conv_states, self.recurrent_states = {0: conv}, {0: recurrent}
        self.is_conv_states_initialized = self.has_previous_state = {0: True}
        self.is_recurrent_states_initialized = {0: recurrent is not None}

    def update_conv_state(self, conv_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:  # noqa: ANN401
        """The convolution itself makes the new state: it finds this layer at what it is given."""
        conv_states.layer = self  # type: ignore[attr-defined]
        return conv_states

    def update_recurrent_state(self, recurrent_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:  # noqa: ANN401
        """Take the new state."""
        self.recurrent_states = {0: recurrent_states}
        return recurrent_states


def planned_cache(model: PreTrainedModel) -> Cache:
    """A cache that holds nothing yet, with a state for each layer that has one.

    A cache without the model's config keeps all positions, also where attention looks at the last ones alone:
    the attention mask sees to that, and the cache has no inputs of its own.
    """
    planned = DynamicCache(config=model.config) if _Layer is not object else DynamicCache()
    if not any(map(_has_state, planned.layers)):
        return DynamicCache()
    planned.layers = [
        layer if _has_state(layer) else cache_utils.DynamicLayer()  # type: ignore[no-untyped-call]
        for layer in planned.layers
    ]
    return planned


def traceable(model: PreTrainedModel, cache: Cache) -> Cache:
    """A cache after a text, with states that a tracer can follow.

    Args:
        model: the decoder that filled it.
        cache: what `planned_cache` gave.

    Raises:
        UnsupportedModelError: a layer's state is neither a short convolution's nor the gated delta rule's.
    """
    cache.layers = [
        _state_of(model, number, layer) if _has_state(layer) else layer
        for number, layer in enumerate(cache.layers)
    ]
    return cache


@contextlib.contextmanager
def states_in_graph(model: PreTrainedModel) -> Iterator[None]:
    """Trace layers with states as operators that take and give them; other layers as they are."""
    modules = {sys.modules[type(part).__module__] for part in model.modules()}
    replaced = [
        (module, name, getattr(module, name))
        for module in modules
        for name in _FORMS
        if hasattr(module, name)
    ]
    for module, name, _ in replaced:
        setattr(module, name, _FORMS[name])
    try:
        yield
    finally:
        for module, name, original in replaced:
            setattr(module, name, original)


def _has_state(layer: object) -> bool:
    return hasattr(layer, "conv_states")


def _state_of(model: PreTrainedModel, number: int, layer: Any) -> StateLayer:  # noqa: ANN401
    known = vars(sys.modules[type(model).__module__])
    conv, recurrent = layer.conv_states[0], layer.recurrent_states[0]
    has_keys = getattr(layer, "keys", None) is not None
    if _CONV not in known or (recurrent is not None and _DELTA not in known) or len(layer.conv_states) > 1:
        kinds = getattr(model.config.get_text_config(), "layer_types", None)
        kind = kinds[number] if kinds else "hybrid"
        raise UnsupportedModelError(
            f"layer {number} of this {model.config.model_type!r} model ({kind}) keeps a state that is "
            "neither a short convolution's nor the gated delta rule's: such layers cannot be exported yet."
        )
    if has_keys or conv is None:
        raise UnsupportedModelError(
            f"layer {number} of this {model.config.model_type!r} model has keys and values beside its state: "
            "such layers cannot be exported yet."
        )
    return StateLayer(conv[..., 1:].clone(), None if recurrent is None else recurrent.clone())


def _causal_conv(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **_: Any,  # noqa: ANN401 - lengths of packed texts, of which there are none
) -> torch.Tensor:
    """A depthwise convolution over past and present inputs, (B, channels, T)."""
    layer: StateLayer = hidden_states.layer  # type: ignore[attr-defined]
    state = layer.conv_states[0]
    made, new = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::CausalConvWithState",
        (hidden_states, weight.unsqueeze(1), bias, state),
        {"ndim": 1, "activation": activation or "none"},
        dtypes=(hidden_states.dtype, state.dtype),
        shapes=(hidden_states.shape, state.shape),
        version=1,
    )
    layer.conv_states = {0: new}
    return made


def _gated_delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,  # noqa: ANN401
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gated DeltaNet (Yang et al. 2024, https://arxiv.org/abs/2412.06464) in float32.

    Args:
        query: (B, T, key heads, key size).
        key: alike.
        value: (B, T, heads, value size).
        g: logarithm of the decay (B, T, heads).
        beta: rate of the update (B, T, heads).
        initial_state: (B, heads, key size, value size).
        use_qk_l2norm_in_kernel: normalise queries and keys.
    """
    batch, length, heads, width = value.shape
    groups, width_of_keys = heads // key.shape[2], int(key.shape[3])
    query, key = (_prepared(part, groups, normalised=use_qk_l2norm_in_kernel) for part in (query, key))
    made, state = torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::LinearAttention",
        (query, key, value.float().flatten(2), initial_state.float(), g.float(), beta.float()),
        {
            "q_num_heads": heads,
            "kv_num_heads": heads,
            "update_rule": "gated_delta",
            "scale": width_of_keys**-0.5,
        },
        dtypes=(torch.float32, torch.float32),
        shapes=((batch, length, heads * width), initial_state.shape),
        version=1,
    )
    return made.reshape(value.shape).to(value.dtype), state.to(initial_state.dtype)


def _prepared(part: torch.Tensor, groups: int, *, normalised: bool) -> torch.Tensor:
    """Queries or keys as float32 (B, T, heads x key size), one for each head of values."""
    part = part.float()
    if normalised:
        part = part * torch.rsqrt((part * part).sum(dim=-1, keepdim=True) + _L2_EPSILON)
    return part.repeat_interleave(groups, dim=2).flatten(2) if groups > 1 else part.flatten(2)


_FORMS: Final[dict[str, Callable[..., Any]]] = {_CONV: _causal_conv, _DELTA: _gated_delta_rule}
