"""Tiny decoders of the families that people deploy, and a comparison of a trimmed folder with them in torch.

Needs torch and transformers: call `pytest.importorskip("torch")` before importing this module.
"""

import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import trimserve
from tests.support.models import with_random_weights
from tests.support.rounding import assert_within, model_bound
from tests.support.tiny_tokenizers import KINDS
from trimserve.decoding.scoring import Scorer
from trimserve.model.resolve import resolve_model
from trimserve.model.structural import structural_ids
from trimserve.vocab.map import Reason, VocabMap
from trimserve_export import export

_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
V = 384
# Beyond every window and original length below.
LONG = 40
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
_WINDOWED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 1,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0 + 0.1 * n for n in range(8)],
    "long_factor": [2.0 + 0.5 * n for n in range(8)],
    "original_max_position_embeddings": 16,
    "factor": 4.0,
}
_GEMMA3N = {
    "hidden_size_per_layer_input": 8,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "intermediate_size": [48] * 4,
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": V,
}
_GEMMA4 = {
    "hidden_size_per_layer_input": 8,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "global_head_dim": 32,
    "vocab_size_per_layer_input": V,
}
_LLAMA4 = {
    "intermediate_size_mlp": 48,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "attention_chunk_size": 8,
    "no_rope_layers": [1, 0],
    "moe_layers": [1],
    "layer_types": ["chunked_attention", "full_attention"],
    "floor_scale": 16,
}
_LATENT = {
    "num_key_value_heads": 2,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
}


def _rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **settings}}


# Name -> (class, what its config has beside the sizes above).
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "llama3_rope": (
        "LlamaForCausalLM",
        _rope(
            "llama3",
            factor=4.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", _EXPERTS),
    "gemma": ("GemmaForCausalLM", {}),
    "gemma2": ("Gemma2ForCausalLM", _WINDOWED | {"query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3ForCausalLM", _WINDOWED | {"query_pre_attn_scalar": 16}),
    "gemma3n": ("Gemma3nForCausalLM", _GEMMA3N),
    "gemma4": ("Gemma4ForCausalLM", _GEMMA4),
    "phi3": ("Phi3ForCausalLM", {"sliding_window": 8}),
    "phi3_long": (
        "Phi3ForCausalLM",
        {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 16, "sliding_window": None},
    ),
    "phi4_mini": (
        "Phi3ForCausalLM",
        {
            "rope_parameters": _LONGROPE | {"partial_rotary_factor": 0.5},
            "partial_rotary_factor": 0.5,
            "head_dim": 32,
            "hidden_size": 64,
            "original_max_position_embeddings": 16,
            "sliding_window": 8,
        },
    ),
    "mistral": ("MistralForCausalLM", {"sliding_window": 8}),
    "ministral": ("MinistralForCausalLM", _WINDOWED),
    "ministral3": ("Ministral3ForCausalLM", {}),
    "mixtral": ("MixtralForCausalLM", _EXPERTS | {"sliding_window": 8}),
    "smollm3": ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0]}),
    "olmo": ("OlmoForCausalLM", {}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "olmo3": ("Olmo3ForCausalLM", _WINDOWED),
    "granite": ("GraniteForCausalLM", {"logits_scaling": 3.0}),
    "granitemoe": ("GraniteMoeForCausalLM", _EXPERTS),
    "glm4": ("Glm4ForCausalLM", {}),
    "gpt_oss": ("GptOssForCausalLM", _WINDOWED | _EXPERTS),
    "nemotron": ("NemotronForCausalLM", {"head_dim": 32, "partial_rotary_factor": 0.5}),
    "exaone4": ("Exaone4ForCausalLM", _WINDOWED),
    "hunyuan": ("HunYuanDenseV1ForCausalLM", {}),
    "ernie4_5": ("Ernie4_5ForCausalLM", {}),
    "seed_oss": ("SeedOssForCausalLM", {}),
    "cohere2": ("Cohere2ForCausalLM", _WINDOWED),
    "starcoder2": ("Starcoder2ForCausalLM", {"sliding_window": 8}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256}),
    "llama4": ("Llama4ForCausalLM", _LLAMA4),
    "deepseek_v2": ("DeepseekV2ForCausalLM", _LATENT),
    "deepseek_v3": ("DeepseekV3ForCausalLM", _LATENT),
    "qwen3_next": ("Qwen3NextForCausalLM", _LINEAR | _EXPERTS | {"shared_expert_intermediate_size": 16}),
    "qwen3_5": ("Qwen3_5ForCausalLM", _LINEAR),
    "qwen3_5_moe": (
        "Qwen3_5MoeForCausalLM",
        _LINEAR | _EXPERTS | {"shared_expert_intermediate_size": 16},
    ),
    "lfm2": (
        "Lfm2ForCausalLM",
        {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_auto_adjust_ff_dim": False},
    ),
}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
_QWEN_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
}
# Name -> (class, the decoder above that is its language model, the other sections of its config).
MULTIMODAL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3": ("Gemma3ForConditionalGeneration", "gemma3", {"vision_config": _VISION}),
    "gemma3n": (
        "Gemma3nForConditionalGeneration",
        "gemma3n",
        {"vision_config": {"hidden_size": 16}, "audio_config": {"hidden_size": 16}},
    ),
    "gemma4": (
        "Gemma4ForConditionalGeneration",
        "gemma4",
        {"vision_config": _VISION | {"head_dim": 8, "num_key_value_heads": 2}, "audio_config": None},
    ),
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        "mistral",
        {"vision_config": _VISION | {"head_dim": 8, "model_type": "pixtral"}},
    ),
    "llama4": (
        "Llama4ForConditionalGeneration",
        "llama4",
        {
            "vision_config": _VISION
            | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16}
        },
    ),
    "qwen3_5": ("Qwen3_5ForConditionalGeneration", "qwen3_5", {"vision_config": _QWEN_VISION}),
    "qwen3_5_moe": ("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe", {"vision_config": _QWEN_VISION}),
}


def save_decoder(name: str, path: Path, **changes: Any) -> Path:
    """A folder of a tiny decoder with random weights and a byte-level tokenizer."""
    class_name, own = DECODERS[name]
    model_class = getattr(transformers, class_name)
    config = model_class.config_class(**settings_of(own | changes))
    return _save(model_class(config), path)


def save_multimodal(name: str, path: Path, **changes: Any) -> Path:
    """A folder of a tiny model of several modalities."""
    class_name, decoder, sections = MULTIMODAL[name]
    model_class = getattr(transformers, class_name)
    text = settings_of(DECODERS[decoder][1])
    text_class = getattr(transformers, DECODERS[decoder][0]).config_class
    sections = copy.deepcopy(sections)
    config = model_class.config_class(
        text_config=text | {"model_type": text_class.model_type}, **sections, **_IDS, **changes
    )
    return _save(model_class(config), path)


def settings_of(own: dict[str, Any]) -> dict[str, Any]:
    # A copy: configs write into the dictionaries that they are given.
    return copy.deepcopy(_SIZES | own | _IDS | {"vocab_size": V})


def _save(model: Any, path: Path) -> Path:
    with_random_weights(model, seed=1).save_pretrained(path)
    KINDS["byte_level_bpe"]().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}', "utf-8")
    return path


@dataclass(frozen=True)
class Pair:
    """A trimmed folder and the model that it was made from."""

    source: Path
    folder: Path

    @cached_property
    def trimmed(self) -> Any:
        return trimserve.load(self.folder)

    @cached_property
    def torch_model(self) -> Any:
        """The class that the folder was saved from."""
        config = transformers.AutoConfig.from_pretrained(self.source)
        model_class = getattr(transformers, config.architectures[0])
        return model_class.from_pretrained(self.source, attn_implementation="eager").eval()

    def greedy(self, ids: np.ndarray, count: int) -> list[int]:
        row = torch.tensor(ids[None].astype(np.int64))
        with torch.no_grad():
            made = self.torch_model.generate(
                row, attention_mask=torch.ones_like(row), max_new_tokens=count, do_sample=False
            )
        return made[0, len(ids) :].tolist()

    def found(self, prompts: list[np.ndarray], count: int, **options: Any) -> list[list[int]]:
        settings = {"max_new_tokens": count, "temperature": 0, "mode": "exact"} | options
        return [list(made.ids) for made in self.trimmed._generate(prompts, settings)]

    def scored(self, ids: np.ndarray) -> np.ndarray:
        """The folder's log-probabilities of each id after those before it."""
        model = self.trimmed
        head = model.cold_head("score")
        return Scorer(model._decoder, model.folder.vocab, model._cold, head).score(ids).log_probs

    def prompts(self) -> list[np.ndarray]:
        """Prompts of unequal length, the last one beyond every window; kept and cold ids."""
        random = np.random.default_rng(5)
        return [random.integers(3, V, size).astype(np.int32) for size in (3, 9, LONG)]


def log_probs(model: Any, ids: np.ndarray) -> np.ndarray:
    """A torch model's log-probabilities of each id after those before it."""
    row = torch.tensor(ids[None].astype(np.int64))
    with torch.no_grad():
        logits = model(row).logits[0].log_softmax(-1)
    return logits[:-1].gather(1, row[0, 1:, None])[:, 0].numpy()


def make_pair(source: Path, folder: Path, exporter: str = "transformers", **options: Any) -> Pair:
    """Trim a model to its structural ids and a third of the others."""
    model = resolve_model(source)
    structural = structural_ids(model)
    others = np.setdiff1d(np.arange(V), structural)[::3]
    kept = np.union1d(structural, others).astype(np.int32)
    vocab = VocabMap(kept, np.full(kept.shape, Reason.PROFILE, np.uint8), V, model.tokenizer_sha256)
    export(source, vocab, folder, exporter=exporter, progress=False, **options)
    return Pair(source, folder)


def compare(pair: Pair, count: int = 16) -> None:
    """Greedy ids one by one and in a batch, and scores, as transformers has them."""
    prompts = pair.prompts()
    expected = [pair.greedy(prompt, count) for prompt in prompts]
    alone = [pair.found([prompt], count)[0] for prompt in prompts]
    assert alone == expected, ("alone", alone, expected)
    together = pair.found(prompts, count)
    assert together == expected, ("batch", together, expected)
    last = prompts[-1]
    bound = model_bound(pair.torch_model, lambda model: log_probs(model, last), draws=3)
    assert_within(pair.scored(last), log_probs(pair.torch_model, last), bound, rows=None)
