"""GGUF files as llama.cpp's converter makes them, of tiny models of transformers, with the gguf package."""

import json
from pathlib import Path

import numpy as np

from tests.support.gguf_files import random_blocks


def tokenizer_fields(document, *, pre=None, scores=None):
    """The metadata of a tokenizer.json: tokens, types, merges or scores."""
    model, added = document["model"], {token["id"]: token for token in document["added_tokens"]}
    by_id = {id_: token for token, id_ in model["vocab"].items()}
    by_id |= {id_: token["content"] for id_, token in added.items()}
    count = max(by_id) + 1
    tokens = [by_id.get(id_, f"<unused {id_}>") for id_ in range(count)]

    def type_of(id_):
        if id_ in added:
            return 3 if added[id_]["special"] else 4
        token = tokens[id_]
        return 6 if len(token) == 6 and token.startswith("<0x") else 1 if id_ in by_id else 5

    fields = {"tokens": tokens, "types": [type_of(id_) for id_ in range(count)]}
    if pre is None:
        fields |= {"model": "llama", "scores": scores or [-float(id_) for id_ in range(count)]}
    else:
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
        fields |= {"model": "gpt2", "pre": pre, "merges": merges}
    return fields


def write_vocab(writer, fields, **ids):
    """Write the fields of `tokenizer_fields` and named ids (bos, eos, unk, pad), flags and a template."""
    writer.add_tokenizer_model(fields["model"])
    writer.add_token_list(fields["tokens"])
    writer.add_token_types(fields["types"])
    if "pre" in fields:
        writer.add_tokenizer_pre(fields["pre"])
        writer.add_token_merges(fields["merges"])
    else:
        writer.add_token_scores(fields["scores"])
    for name, value in ids.items():
        if name == "template":
            writer.add_chat_template(value)
        elif isinstance(value, bool):
            writer.add_bool(f"tokenizer.ggml.{name}", value)
        else:
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", value)


def write_bare_llama(path: Path, fields, *, name="tiny", width=32, **ids):
    """A llama of one layer and random weights over a vocab, small enough to be loaded for its tokenizer."""
    import gguf

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    for key, value in (("context_length", 512), ("embedding_length", width), ("block_count", 1)):
        writer.add_uint32(f"llama.{key}", value)
    writer.add_uint32("llama.feed_forward_length", 64)
    writer.add_uint32("llama.attention.head_count", 2)
    writer.add_uint32("llama.rope.dimension_count", width // 2)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    write_vocab(writer, fields, **ids)
    shapes = {"attn_q": (width, width), "attn_k": (width, width), "attn_v": (width, width)}
    shapes |= {
        "attn_output": (width, width),
        "ffn_gate": (64, width),
        "ffn_up": (64, width),
        "ffn_down": (width, 64),
    }
    writer.add_tensor(
        "token_embd.weight", rng.standard_normal((len(fields["tokens"]), width)).astype(np.float16)
    )
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for norm in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{norm}.weight", np.ones(width, np.float32))
    for part, shape in shapes.items():
        writer.add_tensor(f"blk.0.{part}.weight", rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _interleaved(weight, heads):
    """Rows of query and key as llama.cpp's converter puts them: pairs that are turned stand together."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_model(path: Path, model, name, fields, *, kind="F32", kinds=None, metadata=None, extra=None, **ids):
    """A model of transformers as GGUF: names by the gguf package, the rest as llama.cpp's converter does it.

    Args:
        model: a decoder of transformers.
        name: llama.cpp's name of its architecture.
        fields: of `tokenizer_fields`.
        kind: the format of matrices.
        kinds: of those of some modules, another one, by the module's name. K formats are of random blocks.
        metadata: further keys below the architecture's name.
        extra: further tensors.
        ids: see `write_vocab`.
    """
    import gguf

    config = model.config
    arch = next(code for code, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, name)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    rope = {"rope.dimension_count": head_dim, "rope.freq_base": 10_000.0}
    for key, value in (rope | (metadata or {})).items():
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        add[type(value)](f"{name}.{key}", value)
    write_vocab(writer, fields, **ids)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.float().numpy()
        part = key.split(".")[-2]
        if name == "llama" and part in heads:
            array = _interleaved(array, heads[part])
        if name.startswith("gemma") and part.endswith("norm"):
            array = array + 1
        stored = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert stored is not None, key
        quantized = gguf.GGMLQuantizationType[(kinds or {}).get(part, kind)]
        if array.ndim == 2 and quantized.name.endswith("_K"):  # which the package does not make
            blocks = random_blocks(quantized.name, array.shape, seed=len(stored))
            writer.add_tensor(stored, blocks, raw_dtype=quantized)
        elif array.ndim == 2 and kind != "F32":
            writer.add_tensor(stored, gguf.quantize(array, quantized), raw_dtype=quantized)
        else:
            writer.add_tensor(stored, np.ascontiguousarray(array))
    for key, array in (extra or {}).items():
        writer.add_tensor(key, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read_document(path: Path):
    return json.loads(path.read_text("utf-8"))
