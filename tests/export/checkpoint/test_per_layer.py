"""Checkpoints with per-layer embeddings (Gemma 3n, Gemma 4): both tables are trimmed and exported."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")

import transformers

from tests.support.exports import read_float32
from tests.support.models import needs_transformers_5, with_random_weights
from tests.support.tiny_tokenizers import KINDS, tokenizer_config
from trimserve.errors import UnsupportedModelError
from trimserve.files.tensors import read_header
from trimserve.folder.names import COLD_NAME
from trimserve.model.resolve import resolve_model
from trimserve.model.structural import structural_ids
from trimserve.vocab.map import Reason, VocabMap
from trimserve_export import export
from trimserve_export.checkpoint.configs import PER_LAYER_KEY, compact_rows
from trimserve_export.checkpoint.trim import trim_checkpoint
from trimserve_export.verify import verify

pytestmark = pytest.mark.export

TEXTS = ["the cat sat on the mat", "Grüße, Welt! 🎉"]


_GEMMA = {
    "hidden_size": 24,
    "hidden_size_per_layer_input": 8,  # of 3 layers: as wide as the other table
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_kv_shared_layers": 1,
    "sliding_window": 8,
    "max_position_embeddings": 64,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
}
_GEMMAS = {
    "Gemma3nForCausalLM": _GEMMA
    | {
        "intermediate_size": [24] * 3,
        "laurel_rank": 4,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * 3,
    },
    "Gemma4ForCausalLM": _GEMMA | {"intermediate_size": 24, "global_head_dim": 16},
}


def save_gemma(folder, name: str, *, without_layers: int = 0):
    """A tiny model with per-layer embeddings, which have no rows for the last `without_layers` ids."""
    made = KINDS["byte_level_bpe"]()
    known = tokenizer_config("byte_level_bpe", made)
    model_class = getattr(transformers, name)
    sizes = {"vocab_size": known["vocab_size"], PER_LAYER_KEY: known["vocab_size"] - without_layers}
    config = model_class.config_class(**known | _GEMMAS[name] | sizes | {"pad_token_id": 0})
    with_random_weights(model_class(config), seed=1).save_pretrained(folder)
    made.save(str(folder / "tokenizer.json"))
    return resolve_model(folder)


def vocab_of(source) -> VocabMap:
    """The structural ids and 20 others."""
    structural = structural_ids(source)
    rest = np.setdiff1d(np.arange(source.vocab_size), structural)
    kept = np.union1d(structural, np.random.default_rng(1).choice(rest, 20, replace=False))
    reason = np.full(kept.shape, Reason.PROFILE, np.uint8)
    return VocabMap(kept, reason, source.vocab_size, source.tokenizer_sha256)


@needs_transformers_5
@pytest.mark.parametrize(("name", "without"), [("Gemma3nForCausalLM", 21), ("Gemma4ForCausalLM", 0)])
def test_checkpoints_with_per_layer_embeddings(tmp_path, name, without):
    source = save_gemma(tmp_path / "model", name, without_layers=without)
    vocab = vocab_of(source)
    assert (vocab.cold_ids >= source.vocab_size - without).any() == bool(without)
    export(source, vocab, tmp_path / "trimmed")
    result = verify(tmp_path / "trimmed", source, texts=TEXTS)
    assert result.ok, result.to_dict()
    specs = read_header(tmp_path / "trimmed" / COLD_NAME)[0]
    assert {name: spec.shape for name, spec in specs.items()} == {
        table: (len(vocab.cold_ids), 24) for table in ("embedding", "embedding.1")
    }


@needs_transformers_5
@pytest.mark.parametrize("layout", ["tokenizer", "graph"])
def test_other_layouts(tmp_path, layout):
    source = save_gemma(tmp_path / "model", "Gemma3nForCausalLM", without_layers=21)
    export(source, vocab_of(source), tmp_path / "trimmed", layout=layout)
    result = verify(tmp_path / "trimmed", source, texts=TEXTS)
    assert result.ok, result.to_dict()


def test_trimmed_checkpoint_has_rows_of_both_tables(tmp_path):
    source = save_gemma(tmp_path / "model", "Gemma3nForCausalLM", without_layers=21)
    vocab = vocab_of(source)
    (tmp_path / "out").mkdir()
    cold_path = tmp_path / "out" / COLD_NAME
    trim_checkpoint(source, vocab, tmp_path / "out", cold_path=cold_path, progress=False)
    rows, weights = source.vocab_size - 21, read_float32(tmp_path / "model" / "model.safetensors")
    (stored,) = (name for name in weights if name.endswith("embed_tokens_per_layer.weight"))
    full = weights[stored]
    assert len(full) == rows
    kept = vocab.kept_ids[vocab.kept_ids < rows]
    trimmed = read_float32(tmp_path / "out" / "model.safetensors")[stored]
    np.testing.assert_array_equal(trimmed, full[kept])
    cold = read_float32(cold_path)["embedding.1"]
    np.testing.assert_array_equal(cold, full[np.where(vocab.cold_ids < rows, vocab.cold_ids, 0)])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config[PER_LAYER_KEY]) == (len(vocab), len(kept))
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_first_row_must_stay_where_ids_beyond_the_table_read_it():
    vocab = VocabMap(np.array([1, 5, 9]), np.zeros(3, np.uint8), 12)
    assert compact_rows(12, vocab) == 3
    with pytest.raises(UnsupportedModelError, match="--keep-ids 0"):
        compact_rows(8, vocab)
