"""Families beyond those of test_families.py, and the refused ones; docs/supported-models.md lists both."""

import re

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from tests.support import exports, models
from tests.support.exports import KEPT, Exports, V
from tests.support.folders import make_vocab
from tests.support.models import GENERATE, Family, save_model
from tests.support.rounding import assert_within, model_bound
from trimserve.errors import UnsupportedModelError
from trimserve_export import export

pytestmark = [pytest.mark.export, pytest.mark.slow]

_COMMON = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_COMMON |= {"max_position_embeddings": 64}
_GROUPED = _COMMON | {"num_key_value_heads": 1}
_HEADS = _GROUPED | {"head_dim": 8}
_GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
_ESM = {"mask_token_id": 4, "position_embedding_type": "rotary"}
_GROUPS = {f"{name}_groups": 1 for name in ("q", "k", "v", "post_attention", "intermediate", "output")}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
_LATENT |= {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_experts_per_tok": 2,
}
_LATENT |= {"num_key_value_heads": 2, "moe_intermediate_size": 8}

MORE: dict[str, tuple[str, dict]] = {
    "arcee": ("ArceeForCausalLM", _GROUPED),
    "bloom": ("BloomForCausalLM", {"hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "codegen": ("CodeGenForCausalLM", _GPT | {"n_embd": 32, "n_head": 4, "rotary_dim": 4, "n_ctx": 64}),
    "cohere": ("CohereForCausalLM", _GROUPED),
    "deepseek_v3": ("DeepseekV3ForCausalLM", _COMMON | _LATENT),
    "falcon": ("FalconForCausalLM", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}),
    "gemma": ("GemmaForCausalLM", _HEADS),
    "glm": ("GlmForCausalLM", _HEADS),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", _GPT),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 64}
        | {"attention_types": [[["global", "local"], 1]]},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        _HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2},
    ),
    "gptj": ("GPTJForCausalLM", _GPT | {"rotary_dim": 4}),
    "helium": ("HeliumForCausalLM", _HEADS),
    "mistral": ("MistralForCausalLM", _GROUPED),
    "mpt": ("MptForCausalLM", {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 64}),
    "nemotron": ("NemotronForCausalLM", _HEADS),
    "olmo": ("OlmoForCausalLM", _GROUPED),
    "olmo2": ("Olmo2ForCausalLM", _GROUPED),
    "phi3": ("Phi3ForCausalLM", _GROUPED),
    "qwen2": ("Qwen2ForCausalLM", _GROUPED),
    "qwen3_moe": ("Qwen3MoeForCausalLM", _HEADS | _EXPERTS),
    "smollm3": ("SmolLM3ForCausalLM", _GROUPED),
    "stablelm": ("StableLmForCausalLM", _GROUPED),
    "albert": ("AlbertForMaskedLM", _COMMON | {"embedding_size": 8}),
    "big_bird": ("BigBirdForMaskedLM", _COMMON | {"attention_type": "original_full"}),
    "camembert": ("CamembertForMaskedLM", _COMMON | {"pad_token_id": 1}),
    "convbert": ("ConvBertForMaskedLM", _COMMON | {"embedding_size": 16, "conv_kernel_size": 3}),
    "data2vec_text": ("Data2VecTextForMaskedLM", _COMMON | {"pad_token_id": 1}),
    "deberta": ("DebertaForMaskedLM", _COMMON),
    "deberta_v2": ("DebertaV2ForMaskedLM", _COMMON),
    "esm": ("EsmForMaskedLM", _COMMON | _ESM),
    "megatron_bert": ("MegatronBertForMaskedLM", _COMMON),
    "rembert": ("RemBertForMaskedLM", _COMMON | {"input_embedding_size": 16, "output_embedding_size": 16}),
    "roformer": ("RoFormerForMaskedLM", _COMMON | {"embedding_size": 16}),
    "squeezebert": ("SqueezeBertForMaskedLM", _COMMON | {"embedding_size": 16} | _GROUPS),
    "bert_pretraining": ("BertForPreTraining", _COMMON),
    "gpt2_classifier": ("GPT2ForSequenceClassification", _GPT | {"num_labels": 3}),
    "llama_classifier": ("LlamaForSequenceClassification", _GROUPED | {"num_labels": 3}),
    "qwen3_encoder": ("Qwen3Model", _HEADS),
}


def task_of(model_class: str) -> str:
    if model_class.endswith("ForSequenceClassification"):
        return "text-classification"
    if model_class.endswith(("MaskedLM", "PreTraining")):
        return "fill-mask"
    return GENERATE if model_class.endswith("ForCausalLM") else "feature-extraction"


@pytest.fixture
def add_family(monkeypatch):
    def add(name: str, model_class: str, config: dict) -> None:
        monkeypatch.setitem(models.FAMILIES, name, Family(model_class, task_of(model_class), config))
        if "pad_token_id" in config:
            monkeypatch.setitem(exports._PADS, name, config["pad_token_id"])

    return add


@pytest.mark.parametrize("name", MORE)
def test_trimmed_graph_is_the_full_graph_and_the_model(add_family, tmp_path, name):
    add_family(name, *MORE[name])
    model = Exports(tmp_path)(name)
    ids = np.random.default_rng(0).integers(6, V, (2, 9))
    mask = np.ones(ids.shape, np.int64)
    if model.task in ("fill-mask", "text-classification"):
        ids[1, 6:], mask[1, 6:] = model.torch_model.config.pad_token_id, 0
    trimmed, full = model.run_trimmed(ids, mask=mask), model.run_full(ids, mask=mask)
    output = "last_hidden_state" if model.task == "feature-extraction" else "logits"
    kept = list(KEPT) if "hidden_states" in trimmed else slice(None)
    np.testing.assert_array_equal(trimmed[output], full[output][..., kept])
    real = mask.astype(bool) if trimmed[output].ndim == 3 else slice(None)

    @torch.no_grad()
    def by_torch(torch_model) -> np.ndarray:
        made = torch_model(torch.tensor(ids), attention_mask=torch.tensor(mask))
        return made["prediction_logits" if name == "bert_pretraining" else output].numpy()[real][..., kept]

    bound = model_bound(model.torch_model, by_torch, draws=3)
    assert_within(trimmed[output][real], by_torch(model.torch_model), bound, rows=-1)


_NO_EXPORT = "optimum-onnx 0.1.0 has no export of {!r} models."
_SECOND_TABLE = "has a vocab axis but is neither the embedding nor the head"
REFUSED: dict[str, tuple[str, dict, str]] = {
    "cohere2": ("Cohere2ForCausalLM", _HEADS, _NO_EXPORT.format("cohere2")),
    "ctrl": (
        "CTRLLMHeadModel",
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "dff": 24},
        _NO_EXPORT.format("ctrl"),
    ),
    "ernie": ("ErnieForMaskedLM", _COMMON, _NO_EXPORT.format("ernie")),
    "granitemoe": (
        "GraniteMoeForCausalLM",
        _GROUPED | {"num_local_experts": 4},
        _NO_EXPORT.format("granitemoe"),
    ),
    "mamba": ("MambaForCausalLM", {"hidden_size": 16, "num_hidden_layers": 2}, _NO_EXPORT.format("mamba")),
    "mixtral": ("MixtralForCausalLM", _GROUPED | {"num_local_experts": 4}, _NO_EXPORT.format("mixtral")),
    "modernbert_decoder": ("ModernBertDecoderForCausalLM", _COMMON, _NO_EXPORT.format("modernbert-decoder")),
    "persimmon": ("PersimmonForCausalLM", _COMMON, _NO_EXPORT.format("persimmon")),
    "qwen2_moe": ("Qwen2MoeForCausalLM", _GROUPED, _NO_EXPORT.format("qwen2_moe")),
    "starcoder2": ("Starcoder2ForCausalLM", _GROUPED, _NO_EXPORT.format("starcoder2")),
    "xglm": (
        "XGLMForCausalLM",
        {"d_model": 16, "ffn_dim": 24, "num_layers": 2, "attention_heads": 2},
        _NO_EXPORT.format("xglm"),
    ),
    "phi_grouped": ("PhiForCausalLM", _GROUPED, "cannot export this 'phi' model"),
    "nystromformer": (
        "NystromformerForMaskedLM",
        _COMMON | {"num_landmarks": 4, "segment_means_seq_len": 64},
        "cannot export this 'nystromformer' model",
    ),
    "longformer": (
        "LongformerForMaskedLM",
        _COMMON | {"attention_window": [4, 4]},
        "input global_attention_mask",
    ),
    "mobilebert": ("MobileBertForMaskedLM", _COMMON | {"embedding_size": 8}, _SECOND_TABLE),
    "ibert": ("IBertForMaskedLM", _COMMON, _SECOND_TABLE),
}


@pytest.mark.parametrize("name", REFUSED)
def test_family_is_refused_with_the_reason(add_family, tmp_path, name):
    model_class, config, message = REFUSED[name]
    add_family(name, model_class, config)
    source = save_model(name, tmp_path / "model", rows=V)
    with pytest.raises(UnsupportedModelError, match=re.escape(message)):
        export(source, make_vocab(KEPT, V), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_encoder_from_a_gemma3_decoder_is_refused(tmp_path):
    # transformers' Gemma3TextModel does not find its weights behind the decoder's prefix.
    source = save_model("gemma3", tmp_path / "model", rows=V)
    with pytest.raises(UnsupportedModelError, match="which feature-extraction needs"):
        export(source, make_vocab(KEPT, V), tmp_path / "out", task="feature-extraction")
