"""How long a text a model takes, and where its length changes how positions are computed."""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from transformers import PretrainedConfig

from trimserve.encoder.limits import usable_positions
from trimserve.folder.manifest import Lengths
from trimserve.folder.tasks import GENERATION_TASK
from trimserve.model.source import ModelSource
from trimserve_export.checkpoint.tasks import TASK_CLASSES

LONGROPE, DYNAMIC = "longrope", "dynamic"
_COMPARISONS = frozenset({"Greater", "GreaterOrEqual", "Less", "LessOrEqual"})
_RESTARTING = ("phi3", "phimoe", "phi4")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
_LIMITS = (
    *(*_POSITIONS, "original_max_position_embeddings", "floor_scale"),
    *("sliding_window", "window_size", "local_attention", "attention_chunk_size"),
)


@dataclass(frozen=True, slots=True)
class LengthRope:
    """Rotary frequencies that change with the length.

    Attributes:
        kind: ``"longrope"`` or ``"dynamic"``.
        unchanged: the longest text with the original frequencies, in tokens.
        factor: what dynamic NTK stretches the model's positions by; 1 for longrope.
    """

    kind: str
    unchanged: int
    factor: float = 1.0


def rope_parameters(config: PretrainedConfig) -> list[dict[str, Any]]:
    """The settings of a model's rotary positions, one set for each type of layer; none without them."""
    text = config.get_text_config()
    found = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    if not isinstance(found, dict):
        return []
    nested = [value for value in found.values() if isinstance(value, dict)]
    return nested or [found]


def rope_type(parameters: dict[str, Any]) -> str:
    """The kind of one set of them; older configs call it `type`."""
    return str(parameters.get("rope_type") or parameters.get("type") or "default")


def length_rope(config: PretrainedConfig) -> LengthRope | None:
    """How a model's frequencies change with the length, as the installed transformers reads its config."""
    text = config.get_text_config()
    for parameters in rope_parameters(config):
        kind = rope_type(parameters)
        if kind == LONGROPE:
            return LengthRope(kind, original_length(text, parameters))
        if DYNAMIC in kind:
            return LengthRope(DYNAMIC, text.max_position_embeddings, float(parameters.get("factor", 1.0)))
    return None


def original_length(config: PretrainedConfig, parameters: dict[str, Any]) -> int:
    """Where longrope changes its set.

    transformers 5 keeps it with the parameters; transformers 4 reads it from the config itself alone.
    """
    if hasattr(config, "rope_parameters"):
        found = parameters.get("original_max_position_embeddings")
        found = found or getattr(config, "original_max_position_embeddings", None)
    else:
        found = getattr(config, "original_max_position_embeddings", None)
    return int(found or config.max_position_embeddings)


def limits_of(configs: Iterable[dict[str, Any]]) -> list[int]:
    """Lengths at which something in a model may change, by its configs, in tokens; ascending."""
    found = list(configs)
    ropes = (config.get(key) for config in found for key in ("rope_scaling", "rope_parameters"))
    sets = [rope for rope in ropes if isinstance(rope, dict)]
    found += [*sets, *(value for rope in sets for value in rope.values() if isinstance(value, dict))]
    numbers = [config[key] for config in found for key in _LIMITS if key in config]
    return sorted({number for number in numbers if isinstance(number, int) and number > 2})


def restarts_cache(model_class: type) -> bool:
    """Whether generating goes through a text again once it is longer than longrope's short set.

    Phi-3's classes do; others leave the keys that they have with the short set.
    """
    prepare = getattr(model_class, "prepare_inputs_for_generation", None)
    return prepare is not None and "original_max_position_embeddings" in inspect.getsource(prepare)


def lengths_of(config: PretrainedConfig, task: str) -> Lengths:
    """The lengths of a model, as the installed transformers reads its config."""
    text = config.get_text_config()
    rope = length_rope(config)
    longest = _longest(text)
    if rope is None:
        return Lengths(longest)
    # Dynamic NTK is there for longer texts than the model was trained with.
    longest = longest if longest is None else int(longest * rope.factor)
    classes = TASK_CLASSES[task]._model_mapping if task == GENERATION_TASK else {}
    model_class = classes.get(type(config), None)
    restarts = rope.kind == LONGROPE and model_class is not None and restarts_cache(model_class)
    return Lengths(longest, rope.unchanged, restarts)


def _longest(config: Any) -> int | None:  # noqa: ANN401 - a config, or a dict as attributes
    if getattr(config, "alibi", False):
        return None
    known = {name: getattr(config, name, None) for name in ("model_type", "pad_token_id", *_POSITIONS)}
    found = (usable_positions(known), *(known[name] for name in _POSITIONS[1:]))
    return next((number for number in found if isinstance(number, int) and number > 0), None)


def lengths_of_graph(source: ModelSource, graph: Path) -> Lengths | None:
    """The lengths of a graph that others made, by the config beside it.

    A graph that does not compare lengths where the config says that its rotary frequencies change has one
    set of them: it is right up to there, and takes no longer text.
    """
    found = (config for config in source.text_configs() if "max_position_embeddings" in config)
    config = next(found, None)
    if config is None:
        context = source.genai_model.get("context_length")
        return Lengths(context) if isinstance(context, int) else None
    longest = None if config.get("alibi") else usable_positions(config)
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope_type(parameters)
    if kind != LONGROPE and DYNAMIC not in kind:
        return Lengths(longest)
    original = parameters.get("original_max_position_embeddings")
    original = config.get("original_max_position_embeddings") or original
    unchanged = int(original or config["max_position_embeddings"]) if kind == LONGROPE else int(longest or 0)
    if not _compares_with(graph, unchanged):
        return Lengths(unchanged)
    if kind != LONGROPE:
        return Lengths(int(unchanged * float(parameters.get("factor", 1.0))), unchanged)
    return Lengths(longest, unchanged, str(config.get("model_type", "")).startswith(_RESTARTING))


def _compares_with(path: Path, number: int) -> bool:
    nodes = (node for node in ir.load(path).graph.all_nodes() if node.op_type in _COMPARISONS)
    values = (value for node in nodes for value in node.inputs if value is not None)
    constants = (ir.convenience.get_const_tensor(value) for value in values)
    numbers = (tensor.numpy() for tensor in constants if tensor is not None and tensor.size == 1)
    return any(int(found) == number for found in numbers)
