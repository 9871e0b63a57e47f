"""What onnxruntime-genai's builder makes otherwise than transformers, set right in its graph.

It writes the rotary tables of some kinds of scaling alone, gives a window to no layer unless the config has a
list of layer types, rounds the scale of Gemma's embedding to two decimals, and normalises with an epsilon of
1e-6 where the config has no `rms_norm_eps`. All of them are constants of the graph, and transformers' own
modules say what they should be.
"""

import inspect
import math
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from trimserve.errors import UnsupportedModelError
from trimserve_export.checkpoint.axes import build_on_meta
from trimserve_export.checkpoint.lengths import length_rope, rope_parameters
from trimserve_export.checkpoint.tasks import TASK_CLASSES

Table = npt.NDArray[np.float32]
# Each with the tables that the builder names so: of one set, of Gemma 3's two, of longrope's two.
_TABLE = re.compile(r"^(cos|sin)_cache(?:_(global|local|large|small))?$")
_LAYER_TYPES = {"global": "full_attention", "local": "sliding_attention"}
# GroupQueryAttention takes no other widths of them.
_COLUMNS = 8
_LAYER = re.compile(r"/layers\.(\d+)/")


def check_positions(name: str, config: PretrainedConfig) -> None:
    """Refuse rotary positions that the builder has no graph of, even with other tables.

    Raises:
        UnsupportedModelError: frequencies that change with the length, but for Phi-3's two sets.
    """
    rope = length_rope(config)
    architecture = (config.architectures or [""])[0]
    if (columns := _rotary_columns(config.get_text_config())) % _COLUMNS:
        raise UnsupportedModelError(
            f"{name} builds attention over rotary tables of a multiple of {_COLUMNS} columns, and this "
            f"model's have {columns}: use another exporter."
        )
    if rope is None or (rope.kind == "longrope" and architecture == "Phi3ForCausalLM"):
        return
    raise UnsupportedModelError(
        f"{name} builds one set of rotary frequencies, and this {config.model_type!r} model changes them "
        f"beyond {rope.unchanged:,} tokens ({rope.kind}): use --exporter transformers."
    )


def _rotary_columns(config: PretrainedConfig) -> int:
    named = (found.get("partial_rotary_factor") for found in rope_parameters(config))
    share = next(filter(None, named), None) or getattr(config, "partial_rotary_factor", None) or 1.0
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(size * share) // 2


def plain_rope(config: PretrainedConfig) -> None:
    """Let the builder make tables without scaling, of the same shape: `mend` writes others over them."""
    sets = rope_parameters(config)
    # Its GPT-OSS wants what it reads of YaRN.
    if len(sets) == 1 and length_rope(config) is None and config.model_type != "gpt_oss":
        sets[0]["rope_type"] = "default"


def mend(graph_model: ir.Model, config: PretrainedConfig, name: str) -> None:
    """Set rotary tables, windows and the embedding's scale as transformers has them.

    Args:
        graph_model: the builder's graph; changed in place.
        config: the model's config as the builder had not yet changed it.
        name: the builder, for messages.

    Raises:
        UnsupportedModelError: a table or a layer is not where it is expected.
    """
    model = build_on_meta(config, TASK_CLASSES["text-generation-with-past"])
    _mend_tables(graph_model.graph, model, config, name)
    _mend_windows(graph_model.graph, layer_windows(config.get_text_config(), type(model)), name)
    _mend_embedding_scale(graph_model.graph, config.get_text_config())
    _mend_epsilon(graph_model.graph, model)


def layer_windows(config: PretrainedConfig, model_class: type[nn.Module]) -> list[int | None]:
    """How many positions each layer looks back, itself included; None for all of them."""
    layers: int = config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types:
        return [window if kind == "sliding_attention" else None for kind in types]
    code = inspect.getsource(inspect.getmodule(model_class))  # type: ignore[arg-type]
    # Mistral and Phi-3 have no list: their masks have the window in every layer.
    return [window if "sliding_window_causal_mask" in code else None] * layers


def _mend_tables(graph: ir.Graph, model: nn.Module, config: PretrainedConfig, name: str) -> None:
    rotary = next((module for module in model.modules() if hasattr(module, "rope_type")), None)
    for value_name, tensor, replace in list(_tables(graph)):
        found = _TABLE.match(value_name)
        # The builder writes the tables of both kinds of layers, also of one that this model does not have.
        if found is None or rotary is None or not hasattr(rotary, f"{_prefix(rotary, found[2])}inv_freq"):
            continue
        rows, width = tensor.numpy().shape
        expected = _expected(rotary, config.get_text_config(), found[2], rows)[found[1]]
        if expected.shape[1] != width:
            raise UnsupportedModelError(
                f"{name} makes {value_name} with {width} columns, where this {config.model_type!r} model has "
                f"{expected.shape[1]}: use --exporter transformers."
            )
        replace(ir.Tensor(expected.astype(tensor.dtype.numpy()), name=tensor.name))


def _tables(graph: ir.Graph) -> Iterator[tuple[str, ir.TensorProtocol, Callable[[ir.TensorProtocol], None]]]:
    """Name, tensor and setter of each constant that may be a rotary table, those in branches too."""
    for value in graph.initializers.values():
        if value.const_value is not None and _TABLE.match(str(value.name)):
            yield str(value.name), value.const_value, partial(setattr, value, "const_value")
    for node in graph.all_nodes():
        name = str(node.outputs[0].name) if node.outputs else ""
        if node.op_type == "Constant" and "value" in node.attributes and _TABLE.match(name):
            yield name, node.attributes["value"].as_tensor(), partial(_set_constant, node)


def _set_constant(node: ir.Node, tensor: ir.TensorProtocol) -> None:
    node.attributes["value"] = ir.AttrTensor("value", tensor)


def _prefix(rotary: nn.Module, part: str | None) -> str:
    """What the names of a kind of layer's frequencies begin with."""
    by_kind = part in _LAYER_TYPES and isinstance(rotary.rope_type, dict)
    return f"{_LAYER_TYPES[str(part)]}_" if by_kind else ""


def _expected(rotary: nn.Module, config: Any, part: str | None, rows: int) -> dict[str, Table]:  # noqa: ANN401
    """Transformers' cosines and sines of the first `rows` positions, float32 (rows, frequencies)."""
    made, prefix = type(rotary)(config), _prefix(rotary, part)
    frequencies: torch.Tensor = getattr(made, f"{prefix}inv_freq")
    scaling = float(getattr(made, f"{prefix}attention_scaling", 1.0))
    if part == "large":
        rope = length_rope(config)
        if rope is not None:
            frequencies, _ = ROPE_INIT_FUNCTIONS["longrope"](
                config, frequencies.device, seq_len=rope.unchanged + 1
            )
    angles = torch.outer(torch.arange(rows, dtype=torch.float32), frequencies.float())
    return {"cos": (angles.cos() * scaling).numpy(), "sin": (angles.sin() * scaling).numpy()}


def _mend_windows(graph: ir.Graph, windows: list[int | None], name: str) -> None:
    windowed = {layer for layer, window in enumerate(windows) if window is not None}
    for node in graph.all_nodes():
        found = _LAYER.search(str(node.name))
        if node.op_type != "GroupQueryAttention" or found is None:
            continue
        layer = int(found[1])
        window = windows[layer] if layer < len(windows) else None
        node.attributes["local_window_size"] = ir.AttrInt64("local_window_size", window or -1)
        windowed.discard(layer)
    if windowed:
        raise UnsupportedModelError(
            f"{name} gives layer {min(windowed)} no attention that takes a window of "
            f"{windows[min(windowed)]:,} positions: use --exporter transformers."
        )


def _mend_embedding_scale(graph: ir.Graph, config: PretrainedConfig) -> None:
    if not config.model_type.startswith("gemma"):
        return
    exact = math.sqrt(config.hidden_size)
    products = [node for node in graph if node.op_type == "Mul" and "/embed_tokens/" in str(node.name)]
    for value in (value for node in products for value in node.inputs if value is not None):
        constant = value.producer()
        if constant is None or constant.op_type != "Constant":
            continue
        number = constant.attributes["value"].as_tensor().numpy()
        if number.size == 1:
            _set_constant(constant, ir.Tensor(np.full_like(number, exact), name=value.name))


def _mend_epsilon(graph: ir.Graph, model: nn.Module) -> None:
    """Write what all of a model's normalisations add below the root; where they differ, the builder knows."""
    norms = [module for module in model.modules() if "Norm" in type(module).__name__]
    known = (getattr(module, "eps", getattr(module, "variance_epsilon", None)) for module in norms)
    numbers = {float(number) for number in known if isinstance(number, float)}
    if len(numbers) != 1:
        return
    (epsilon,) = numbers
    for node in graph.all_nodes():
        if node.op_type.endswith(("LayerNormalization", "RMSNormalization")):
            node.attributes["epsilon"] = ir.AttrFloat32("epsilon", epsilon)
