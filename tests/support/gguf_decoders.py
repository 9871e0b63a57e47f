"""Tiny decoders of every architecture that GGUF files are read and written of, their weights random."""

import json

import torch
import transformers

from tests.support import tiny_tokenizers
from tests.support.gguf_models import tokenizer_fields

LAYERS = 2
WINDOW = 8
PROMPT = [5, 9, 70, 33, 8, 120, 44, 5, 9, 17, 80, 21, 100, 30]  # longer than the window
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
GEMMA2 = {"attention.sliding_window": WINDOW, "attn_logit_softcapping": 40.0, "final_logit_softcapping": 25.0}
# Name -> architecture, config, its settings, further metadata.
CASES = {
    "llama": ("llama", "LlamaConfig", {"head_dim": 16, "tie_word_embeddings": False}, {}),
    "llama-biased": ("llama", "LlamaConfig", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}, {}),  # noqa: E501
    "llama-3.2": ("llama", "LlamaConfig", {"head_dim": 64, "rope_theta": 5e5, "rope_scaling": LLAMA3}, {"rope.freq_base": 5e5}),  # noqa: E501
    "qwen2": ("qwen2", "Qwen2Config", {"tie_word_embeddings": False, "rope_theta": 1e6}, {"rope.freq_base": 1e6}),  # noqa: E501
    "qwen3": ("qwen3", "Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True}, {}),
    "gemma": ("gemma", "GemmaConfig", {"head_dim": 32}, {}),
    "gemma2": ("gemma2", "Gemma2Config", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": WINDOW, "attn_logit_softcapping": 40.0, "final_logit_softcapping": 25.0}, GEMMA2),  # noqa: E501
    "gemma3": ("gemma3", "Gemma3TextConfig", {"head_dim": 32, "num_hidden_layers": 7, "query_pre_attn_scalar": 32, "sliding_window": WINDOW, "rope_theta": 1e6}, {"attention.sliding_window": WINDOW, "rope.freq_base": 1e6}),  # noqa: E501
    "phi3": ("phi3", "Phi3Config", {"sliding_window": None, "tie_word_embeddings": False}, {"attention.sliding_window": 0}),  # noqa: E501
}  # fmt: skip


def make_model(case, **sizes):
    """The model with weights that no init leaves at 0 or 1, perhaps of other sizes."""
    _, config_class, settings, _ = CASES[case]
    vocab = len(fields()["tokens"])
    config = getattr(transformers, config_class)(**SIZES | {"vocab_size": vocab} | settings | sizes)
    torch.manual_seed(sum(map(ord, case)))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            ones = 1.0 if weight.ndim == 1 and name.endswith("norm.weight") and "gemma" not in case else 0.0
            weight.copy_(torch.randn_like(weight) * (0.3 if weight.ndim == 2 else 0.2) + ones)
    return model.eval()


def fields():
    return tokenizer_fields(json.loads(tiny_tokenizers.byte_level_bpe().to_str()), pre="gpt-2")
