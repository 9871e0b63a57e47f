"""Encoders, embedders and rerankers that people deploy, tiny: a trimmed folder gives what torch gives.

Models are compared by their outputs for a padded batch with a text beyond every window, folders of
sentence-transformers by what the library makes of texts. What needs transformers 5 runs in its environment.
"""

import copy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
import transformers
from tokenizers.processors import TemplateProcessing

from tests.support.models import needs_transformers_5, with_random_weights
from tests.support.rounding import assert_within, model_bound
from tests.support.sentence_models import (
    OLD,
    PAIRS,
    TEXTS,
    add_modules,
    change_json,
    library,
    save_weights,
    trimmed,
    write_json,
)
from tests.support.tiny_tokenizers import KINDS, tokenizer_config
from trimserve_export.verify import verify

pytestmark = [pytest.mark.export, needs_transformers_5]
H = 32
_SIZES = {
    "hidden_size": H,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}
_GROUPED = _SIZES | {"num_key_value_heads": 1, "head_dim": 16}
_WINDOWED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_GEMMA = _GROUPED | _WINDOWED | {"use_bidirectional_attention": True, "query_pre_attn_scalar": 16}
_DEBERTA = _SIZES | {
    "relative_attention": True,
    "position_buckets": 16,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
    "conv_kernel_size": 0,
}
_MODERN = _SIZES | {"global_attn_every_n_layers": 2, "local_attention": 8}
# Name -> (class, tokenizer, config).
ENCODERS: dict[str, tuple[str, str, dict]] = {
    "eurobert": ("EuroBertForMaskedLM", "byte_level_bpe", _GROUPED),
    "eurobert_vectors": ("EuroBertModel", "byte_level_bpe", _GROUPED),
    "eurobert_classifier": ("EuroBertForSequenceClassification", "byte_level_bpe", _GROUPED),
    "nomic_bert": ("NomicBertForMaskedLM", "wordpiece", _SIZES),
    "nomic_bert_vectors": ("NomicBertModel", "wordpiece", _SIZES),
    "jina_v3": ("JinaEmbeddingsV3ForMaskedLM", "unigram", _SIZES),
    "jina_v3_vectors": ("JinaEmbeddingsV3Model", "unigram", _SIZES),
    "deberta_v3": ("DebertaV2ForMaskedLM", "unigram", _DEBERTA),
    "deberta_v3_vectors": ("DebertaV2Model", "unigram", _DEBERTA),
    "deberta_v3_reranker": ("DebertaV2ForSequenceClassification", "unigram", _DEBERTA | {"num_labels": 1}),
    "modernbert_vectors": ("ModernBertModel", "byte_level_bpe", _MODERN),
    "modernbert_reranker": (
        "ModernBertForSequenceClassification",
        "byte_level_bpe",
        _MODERN | {"num_labels": 1},
    ),
    "xlm_roberta_vectors": ("XLMRobertaModel", "unigram", _SIZES),
    "xlm_roberta_reranker": ("XLMRobertaForSequenceClassification", "unigram", _SIZES | {"num_labels": 1}),
    "qwen3_vectors": ("Qwen3Model", "byte_level_bpe", _GROUPED),
    "qwen3_reranker": ("Qwen3ForSequenceClassification", "byte_level_bpe", _GROUPED | {"num_labels": 1}),
    "embeddinggemma": ("Gemma3TextModel", "sentencepiece_bpe", _GEMMA),
}
# Attention of a decoder's class that looks both ways, which no other test has.
_QUICK = {"embeddinggemma"}


def all_but(names, quick):
    """Exporting takes seconds: what is much like another case is left to `make test-families`."""
    return [pytest.param(name, marks=[] if name in quick else [pytest.mark.families]) for name in names]


def save_encoder(name: str, path: Path) -> Path:
    """A folder of a tiny encoder with random weights."""
    class_name, kind, own = ENCODERS[name]
    tokenizer = KINDS[kind]()
    known = tokenizer_config(kind, tokenizer)
    ids = {key: known[key] for key in known if key.endswith("_token_id") or key == "vocab_size"}
    model_class = getattr(transformers, class_name)
    config = model_class.config_class(**copy.deepcopy({"pad_token_id": 0, "mask_token_id": 3} | own | ids))
    with_random_weights(model_class(config), seed=1).save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    pad = tokenizer.id_to_token(config.pad_token_id)
    write_json(
        path / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": pad}
    )
    return path


def by_torch(model, ids: np.ndarray, columns=slice(None)) -> np.ndarray:
    """A torch model's numbers for one text, without a batch."""
    row = torch.tensor(ids[None].astype(np.int64))
    with torch.no_grad():
        made = model(input_ids=row, attention_mask=torch.ones_like(row))
    return made["last_hidden_state" if "last_hidden_state" in made else "logits"][0].numpy()[..., columns]


@pytest.mark.parametrize("name", all_but(ENCODERS, _QUICK))
def test_an_encoder_is_transformers_model(tmp_path, name):
    source = save_encoder(name, tmp_path / "model")
    encoder = trimmed(source, tmp_path / "out")
    model = getattr(transformers, ENCODERS[name][0]).from_pretrained(source).eval()
    kept = encoder.folder.vocab.kept_ids if encoder.task == "fill-mask" else slice(None)
    texts = [text for text in TEXTS if text]
    everything = encoder.token_ids(texts)
    assert not encoder.folder.vocab.is_kept(np.concatenate(everything)).all()  # the cold path is taken
    bound = model_bound(
        model,
        lambda model: np.concatenate([by_torch(model, ids, kept).ravel() for ids in everything]),
        draws=2,
    )
    for ids, found in zip(everything, encoder.forward(texts, batch_size=3), strict=True):
        assert_within(found, by_torch(model, ids, kept), bound, rows=0 if found.size > 1 else None)
    result = verify(tmp_path / "out", source, store=False)
    assert result.ok, [check for check in result.checks if not check.ok]


def _normalized(path: Path, *modules: tuple[str, dict], prompts: dict[str, str]) -> Path:
    add_modules(path, *modules, (f"{OLD}.Normalize", {}))
    settings = {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"}
    write_json(path / "config_sentence_transformers.json", settings)
    return path


def _pooling(mode: str) -> tuple[str, dict]:
    return "Pooling", {"word_embedding_dimension": H, f"pooling_mode_{mode}": True, "include_prompt": True}


def embeddinggemma(path: Path) -> Path:
    """As google/embeddinggemma-300m lies on the hub: two Dense modules behind the mean."""
    dense = [
        (
            "Dense",
            {"in_features": width, "out_features": made, "bias": False, "activation_function": _IDENTITY},
        )
        for width, made in ((H, 48), (48, H))
    ]
    prompts = {"query": "the cat sat: ", "document": "title: none | text: "}
    _normalized(save_encoder("embeddinggemma", path), _pooling("mean_tokens"), *dense, prompts=prompts)
    save_weights(path / "2_Dense", seed=1, linear_weight=(48, H))
    save_weights(path / "3_Dense", seed=2, linear_weight=(H, 48))
    return path


def qwen3_embedder(path: Path) -> Path:
    """As Qwen/Qwen3-Embedding-0.6B: left padding, a token behind each text, whose vector is the text's."""
    save_encoder("qwen3_vectors", path)
    # The checkpoint on the hub has the class of a decoder, and is loaded without its head.
    change_json(path / "config.json", architectures=["Qwen3ForCausalLM"])
    tokenizer = KINDS["byte_level_bpe"]()
    end = "<|endoftext|>"
    tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, tokenizer.token_to_id(end))]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    change_json(path / "tokenizer_config.json", padding_side="left", pad_token=end)
    prompts = {"query": "Instruct: the cat sat\nQuery:", "document": ""}
    return _normalized(path, _pooling("lasttoken"), prompts=prompts)


_IDENTITY = "torch.nn.modules.linear.Identity"
EMBEDDERS = {"embeddinggemma": embeddinggemma, "qwen3": qwen3_embedder}


@pytest.mark.families
@pytest.mark.parametrize("name", EMBEDDERS)
def test_an_embedder_is_the_librarys(tmp_path, name):
    pytest.importorskip("sentence_transformers")
    source = EMBEDDERS[name](tmp_path / "model")
    encoder = trimmed(source, tmp_path / "out")
    model = library(source)
    for prompt in ("query", "document"):
        expected = model.encode(TEXTS, prompt_name=prompt)
        bound = model_bound(
            model, lambda model, prompt=prompt: model.encode(TEXTS, prompt_name=prompt), draws=2
        )
        assert_within(encoder.encode(TEXTS, prompt_name=prompt, batch_size=4), expected, bound, rows=0)
    result = verify(tmp_path / "out", source, store=False)
    assert result.ok, [check for check in result.checks if not check.ok]


@pytest.mark.families
@pytest.mark.parametrize("name", [name for name in ENCODERS if name.endswith("reranker")])
def test_a_reranker_is_the_librarys(tmp_path, name):
    pytest.importorskip("sentence_transformers")
    source = save_encoder(name, tmp_path / "model")
    encoder = trimmed(source, tmp_path / "out")
    model = library(source, "CrossEncoder")
    expected = model.predict(PAIRS)
    bound = model_bound(model, lambda model: model.predict(PAIRS), draws=2)
    assert_within(encoder.predict(PAIRS, batch_size=3), expected, bound, rows=0)
