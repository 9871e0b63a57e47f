"""genai_config.json: what onnxruntime-genai wants to know of a decoder that another exporter made."""

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
from transformers import PretrainedConfig

from trimserve.files.model_json import read_model_json
from trimserve_export.checkpoint.axes import load_config

GENAI_CONFIG_NAME = "genai_config.json"
# onnxruntime-genai's name for a decoder with a key-value cache and nothing of its own.
_MODEL_TYPE = "decoder"
_DEFAULT_LENGTH = 2048


def write_genai_config(graph_path: Path, *, vocab_size: int) -> Path | None:
    """Write genai_config.json beside a graph with a key-value cache, or bring the exporter's own up to date.

    Args:
        graph_path: the graph; config.json (and generation_config.json) with the ids that it takes lie beside.
        vocab_size: columns of its logits.

    Returns:
        The path; None where the graph has no plain cache, or the configs name no end of text.
    """
    folder = graph_path.parent
    if (folder / GENAI_CONFIG_NAME).is_file():
        return _adopt(graph_path, vocab_size)
    config = load_config(folder).get_text_config()
    decoder = _decoder(ir.load(graph_path).graph, config)
    ids = _token_ids(folder, config.to_dict())
    if decoder is None or ids["eos_token_id"] is None:
        return None
    length = getattr(config, "max_position_embeddings", None) or _DEFAULT_LENGTH
    model = {
        "type": _MODEL_TYPE,
        "context_length": length,
        "vocab_size": vocab_size,
        **ids,
        "decoder": decoder | {"filename": graph_path.name},
    }
    search = {"do_sample": False, "max_length": length, "past_present_share_buffer": False}
    path = folder / GENAI_CONFIG_NAME
    path.write_text(json.dumps({"model": model, "search": search}, indent=2) + "\n", "utf-8")
    return path


def _adopt(graph_path: Path, vocab_size: int) -> Path:
    """Keep what onnxruntime-genai's builder wrote of the graph, and write the ids that the graph takes."""
    path = graph_path.with_name(GENAI_CONFIG_NAME)
    content = read_model_json(path)
    config = load_config(path.parent).get_text_config()
    model = content["model"] | _token_ids(path.parent, config.to_dict()) | {"vocab_size": vocab_size}
    model["decoder"] |= {"filename": graph_path.name}
    path.write_text(json.dumps(content | {"model": model}, indent=2) + "\n", "utf-8")
    return path


def _decoder(graph: ir.Graph, config: PretrainedConfig) -> dict[str, Any] | None:
    """Sizes and names of a graph, read from its own inputs; None without a cache of fixed sizes."""
    inputs = {str(value.name): value for value in graph.inputs}
    cache = inputs.get("past_key_values.0.key")
    if cache is None or cache.shape is None or len(cache.shape) != 4:
        return None
    heads, head_size = cache.shape[1], cache.shape[3]
    if not isinstance(heads, int) or not isinstance(head_size, int):
        return None
    named = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
    return {
        "head_size": head_size,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": sum(name.endswith(".key") for name in inputs),
        "num_key_value_heads": heads,
        "inputs": named
        | {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"},
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
    }


def _token_ids(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Ids of beginning, end and padding, an absent one the end's; generation_config.json speaks last."""
    named = read_model_json(folder / "generation_config.json")
    ids = {key: named.get(key, config.get(key)) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    end = ids["eos_token_id"]
    first = end[0] if isinstance(end, list) else end
    return {key: first if id_ is None else id_ for key, id_ in ids.items()}
