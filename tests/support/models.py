"""Tiny models of every family with a tokenizer beside them: folders as the hub has them, made from configs.

Needs torch and transformers: call `pytest.importorskip("torch")` before importing this module.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.support.tiny_tokenizers import KINDS, tokenizer_config
from trimserve_export.exporters.choice import is_installed

GENERATE = "text-generation-with-past"
HIDDEN = 16


@dataclass(frozen=True)
class Family:
    """How to make a model of a family; every size is tiny and no two of them are equal by intent."""

    model_class: str
    task: str
    config: dict[str, Any] = field(default_factory=dict)


_SIZES = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2}
_COMMON = _SIZES | {"intermediate_size": 24, "max_position_embeddings": 64}
_GROUPED = _COMMON | {"num_key_value_heads": 1}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", GENERATE, _GROUPED | {"tie_word_embeddings": False}),
    "llama_tied": Family("LlamaForCausalLM", GENERATE, _GROUPED | {"tie_word_embeddings": True}),
    "qwen3": Family("Qwen3ForCausalLM", GENERATE, _GROUPED | {"head_dim": 8, "tie_word_embeddings": True}),
    "gemma3": Family("Gemma3ForCausalLM", GENERATE, _GROUPED | {"head_dim": 8, "sliding_window": 8}),
    # Soft cap, scale: something stands between the head's product and the logits.
    "gemma2": Family(
        "Gemma2ForCausalLM",
        GENERATE,
        _GROUPED
        | {"head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 5.0, "tie_word_embeddings": False},
    ),
    "granite": Family(
        "GraniteForCausalLM", GENERATE, _GROUPED | {"logits_scaling": 3.0, "tie_word_embeddings": False}
    ),
    "gpt2": Family(
        "GPT2LMHeadModel", GENERATE, {"n_embd": HIDDEN, "n_layer": 2, "n_head": 2, "n_positions": 64}
    ),
    "opt": Family(
        "OPTForCausalLM",
        GENERATE,
        _SIZES | {"ffn_dim": 24, "word_embed_proj_dim": HIDDEN, "max_position_embeddings": 64},
    ),
    "gpt_neox": Family("GPTNeoXForCausalLM", GENERATE, _COMMON),
    "phi": Family("PhiForCausalLM", GENERATE, _COMMON),  # the head has a bias
    "bert": Family("BertForMaskedLM", "fill-mask", _COMMON),
    "roberta": Family("RobertaForMaskedLM", "fill-mask", _COMMON),
    "xlm_roberta": Family("XLMRobertaForMaskedLM", "fill-mask", _COMMON),
    "distilbert": Family(
        "DistilBertForMaskedLM",
        "fill-mask",
        {"dim": HIDDEN, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 64},
    ),
    "mpnet": Family("MPNetForMaskedLM", "fill-mask", _COMMON),
    "electra": Family("ElectraForMaskedLM", "fill-mask", _COMMON | {"embedding_size": 8}),
    "modernbert": Family(
        "ModernBertForMaskedLM",
        "fill-mask",
        _COMMON | {"global_attn_every_n_layers": 2, "local_attention": 8},
    ),
    "bert_encoder": Family("BertModel", "feature-extraction", _COMMON),
    "mpnet_encoder": Family("MPNetModel", "feature-extraction", _COMMON),
    "bert_classifier": Family(
        "BertForSequenceClassification", "text-classification", _COMMON | {"num_labels": 3}
    ),
    "bert_tagger": Family("BertForTokenClassification", "token-classification", _COMMON | {"num_labels": 3}),
}
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id")


def save_model(
    family: str,
    path: Path,
    *,
    tokenizer: str = "wordpiece",
    rows: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **config: Any,
) -> Path:
    """Make a model folder: config.json, safetensors weights, tokenizer.json.

    Args:
        family: a key of `FAMILIES`.
        path: the folder to make.
        tokenizer: a key of `tiny_tokenizers.KINDS`.
        rows: V; by default what the tokenizer's usual model has (padding rows included).
        seed: of the random weights.
        dtype: of the stored weights.
        max_shard_size: weights above it are split and get an index.
        config: overrides of the config.
    """
    made = KINDS[tokenizer]()
    known = tokenizer_config(tokenizer, made)
    ids = {name: known.get(name) for name in (*_TOKEN_IDS, "tokenizer_class")}
    size = known["vocab_size"] if rows is None else rows
    model_class = getattr(transformers, FAMILIES[family].model_class)
    # A copy: configs write into the dictionaries that they are given.
    own = copy.deepcopy(FAMILIES[family].config | ids | {"vocab_size": size} | config)
    settings = model_class.config_class(**own)
    model = with_random_weights(model_class(settings), seed).to(dtype)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    made.save(str(path / "tokenizer.json"))
    return path


def with_random_weights(model: transformers.PreTrainedModel, seed: int) -> transformers.PreTrainedModel:
    """Fill a model with weights of trained size: initial ones give every token nearly the same logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * noise if parameter.ndim > 1 else parameter + 0.1 * noise)
    return model.eval()


needs_transformers_5 = pytest.mark.skipif(not is_installed("transformers"), reason="needs transformers 5")
# Of one graph, as the exporter of this environment makes it, for tests in which any will do.
PLAIN_EXPORTER = "optimum" if is_installed("optimum") else "transformers"
