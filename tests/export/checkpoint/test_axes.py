"""Vocab tensors are told by the model's class, whatever sizes meet by chance."""

import pytest

pytest.importorskip("torch")

import transformers

from tests.support.models import FAMILIES
from trimserve.errors import TrimserveError, UnsupportedModelError
from trimserve_export.checkpoint.axes import architecture_class, find_vocab_axes, load_config

pytestmark = pytest.mark.export

V = 37


def axes_of(model_class: str, **config):
    found = getattr(transformers, model_class)
    return find_vocab_axes(found.config_class(**config), found)


def config_of(family: str, **overrides):
    return FAMILIES[family].config | {"vocab_size": V, "pad_token_id": 0} | overrides


ROLES = {
    "llama": (["embedding", "head"], False),
    "llama_tied": (["embedding"], True),
    "gpt_neox": (["embedding", "head"], False),
    "phi": (["embedding", "head", "head_bias"], False),
    "gemma3": (["embedding"], True),
    "bert": (["embedding", "head_bias"], True),
    "distilbert": (["embedding", "head_bias"], True),
    "electra": (["embedding", "head_bias"], True),
    "modernbert": (["embedding", "head_bias"], True),
    "bert_encoder": (["embedding"], False),
    "bert_classifier": (["embedding"], False),
}


@pytest.mark.parametrize("family", ROLES)
def test_roles_and_ties(family):
    axes = axes_of(FAMILIES[family].model_class, **config_of(family))
    assert ([tensor.role for tensor in axes.tensors], axes.tied) == ROLES[family]
    assert all(tensor.axis == 0 for tensor in axes.tensors)


def test_all_names_of_a_tie_are_found():
    axes = axes_of("BertForMaskedLM", **config_of("bert"))
    assert axes.get("embedding").names == (
        "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.weight",
    )
    assert axes.get("head_bias").names == ("cls.predictions.bias", "cls.predictions.decoder.bias")


def test_final_logits_bias_is_cut_along_its_second_axis():
    sizes = {
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
    }
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    axes = axes_of("BartForConditionalGeneration", vocab_size=V, **sizes, **heads)
    assert (axes.get("head_bias").names, axes.get("head_bias").axis) == (("final_logits_bias",), 1)
    assert len(axes.get("embedding").names) == 4  # shared, encoder, decoder, head


def test_sizes_equal_to_the_vocab_confuse_nothing():
    sizes = {"max_position_embeddings": V, "intermediate_size": V, "type_vocab_size": V, "num_labels": V}
    plain = axes_of("BertForSequenceClassification", **config_of("bert_classifier"))
    equal = axes_of("BertForSequenceClassification", **config_of("bert_classifier", **sizes))
    assert equal.tensors == plain.tensors


def test_hidden_size_equal_to_the_vocab_confuses_nothing():
    equal = axes_of("GPT2LMHeadModel", vocab_size=16, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    assert equal.get("embedding").names == ("transformer.wte.weight", "lm_head.weight")
    assert len(equal.tensors) == 1


@pytest.mark.parametrize(
    ("family", "tables"),
    [("bert", 0), ("llama", 0), ("opt", 0), ("roberta", 1), ("xlm_roberta", 1), ("mpnet", 1)],
)
def test_positions_counted_from_the_pad_id_are_noticed(family, tables):
    axes = axes_of(FAMILIES[family].model_class, **config_of(family, pad_token_id=1))
    assert len(axes.pad_moves_positions) == tables


def test_per_layer_embeddings_are_a_second_table():
    layers = {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
    }
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    more = {
        "head_dim": 8,
        "hidden_size_per_layer_input": 4,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0, 0.0],
    }
    given = {"vocab_size": V, "vocab_size_per_layer_input": V - 5, "pad_token_id": 0}
    axes = axes_of("Gemma3nForCausalLM", **given, **layers, **sizes, **more)
    assert [(tensor.role, tensor.axis) for tensor in axes.tensors] == [("embedding", 0), ("embedding.1", 0)]
    assert axes.get("embedding.1").names == ("model.embed_tokens_per_layer.weight",)
    assert axes.pad_moves_positions == ()


def test_head_of_two_parts_is_refused():
    sizes = {"hidden_size": 16, "embedding_size": 8, "intermediate_size": 24, "num_hidden_layers": 1}
    with pytest.raises(UnsupportedModelError, match=r"cls.predictions.dense.weight has a vocab axis"):
        axes_of("MobileBertForMaskedLM", vocab_size=V, num_attention_heads=2, **sizes)


def test_class_that_cannot_be_built_is_refused():
    with pytest.raises(UnsupportedModelError, match="cannot build"):
        axes_of("GPT2LMHeadModel", vocab_size=V, n_embd=15, n_head=2)


def write_config(path, content: str):
    (path / "config.json").write_text(content)
    return path


def test_unknown_model_type_is_refused(tmp_path):
    write_config(tmp_path, '{"model_type": "unheard-of", "vocab_size": 37}')
    with pytest.raises(UnsupportedModelError, match="unheard-of"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "should hold a JSON object"),
        ("{}", "has no config.json"),
        ('{"model_type": "llama", "vocab_size": 37, "rope_scaling": 3}', "at `.*rope_scaling`"),
    ],
)
def test_config_that_is_none_is_refused(tmp_path, content, message):
    write_config(tmp_path, content)
    with pytest.raises(TrimserveError, match=message):
        load_config(tmp_path)


def test_remote_code_needs_the_flag(tmp_path):
    write_config(
        tmp_path, '{"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}, "vocab_size": 37}'
    )
    (tmp_path / "own.py").write_text(
        "from transformers import PretrainedConfig\n"
        "class OwnConfig(PretrainedConfig):\n"
        "    model_type = 'own'\n"
        "    def __init__(self, vocab_size=5, **kwargs):\n"
        "        self.vocab_size = vocab_size\n"
        "        super().__init__(**kwargs)\n"
    )
    with pytest.raises(UnsupportedModelError, match="--trust-remote-code"):
        load_config(tmp_path)
    assert load_config(tmp_path, trust_remote_code=True).vocab_size == V


def test_model_without_a_vocab_is_refused(tmp_path):
    with pytest.raises(UnsupportedModelError, match="no vocab_size"):
        load_config(write_config(tmp_path, '{"model_type": "vit"}'))


def test_architecture_class_may_be_absent():
    config = transformers.BertConfig(architectures=["NoSuchModel"])
    assert architecture_class(config) is None
    assert architecture_class(transformers.BertConfig()) is None
