"""Configs for the compact vocab: every token id moves, nothing else does."""

import json

import pytest

pytest.importorskip("transformers")

import transformers

from tests.support.folders import make_vocab
from trimserve_export.checkpoint.configs import compact_config, write_compact_configs

pytestmark = pytest.mark.export

# token id -> compact id: 2 -> 0, 5 -> 1, 9 -> 2, 30 -> 3
VOCAB = make_vocab([2, 5, 9, 30], 37)


def test_ids_move_and_numbers_that_are_no_ids_stay():
    config = {"eos_token_id": 9, "bos_token_id": 2, "hidden_size": 9, "num_hidden_layers": 2, "name": "x"}
    expected = config | {"eos_token_id": 2, "bos_token_id": 0}
    assert compact_config(config, VOCAB) == expected


def test_lists_of_ids_lose_the_cold_ones():
    config = {"eos_token_id": [9, 10, 30], "suppress_tokens": [1, 2], "image_token_ids": [5]}
    expected = {"eos_token_id": [2, 3], "suppress_tokens": [0], "image_token_ids": [1]}
    assert compact_config(config, VOCAB) == expected


def test_cold_and_absent_ids_become_none():
    config = {"pad_token_id": 3, "sep_token_id": None, "cls_token_id": -1, "eos_token_id": 99}
    expected = {"pad_token_id": None, "sep_token_id": None, "cls_token_id": -1, "eos_token_id": None}
    assert compact_config(config, VOCAB) == expected


def test_biased_sequences_with_a_cold_id_leave_as_a_whole():
    config = {"sequence_bias": [[[2, 5], 9.0], [[2, 3], 1.0], [[30], -2.0]]}
    assert compact_config(config, VOCAB) == {"sequence_bias": [[[0, 1], 9.0], [[3], -2.0]]}
    assert compact_config({"sequence_bias": [[[3], 1.0]]}, VOCAB) == {"sequence_bias": None}


def test_phrases_with_a_cold_id_leave_as_a_whole():
    config = {"bad_words_ids": [[2, 5], [2, 3], [30]], "forced_decoder_ids": [[1, 9], [2, 10]]}
    expected = {"bad_words_ids": [[0, 1], [3]], "forced_decoder_ids": [[1, 2]]}
    assert compact_config(config, VOCAB) == expected
    assert compact_config({"bad_words_ids": [[3]]}, VOCAB) == {"bad_words_ids": None}


def test_nested_configs_move_too():
    config = {"text_config": {"eos_token_id": 9, "vocab_size": 37}, "eos_token_id": 30}
    expected = {"text_config": {"eos_token_id": 2, "vocab_size": 37}, "eos_token_id": 3}
    assert compact_config(config, VOCAB) == expected


def write(tmp_path, content: dict, generation: dict | None = None) -> dict:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "config.json").write_text(json.dumps(content))
    if generation is not None:
        (source / "generation_config.json").write_text(json.dumps(generation))
    config = transformers.AutoConfig.from_pretrained(source)
    write_compact_configs(source, target, config, VOCAB)
    return {path.name: json.loads(path.read_text()) for path in target.iterdir()}


def test_written_configs_have_the_compact_size_and_ids(tmp_path):
    content = {"model_type": "llama", "vocab_size": 37, "eos_token_id": 9}
    written = write(tmp_path, content, {"eos_token_id": [9, 30], "top_k": 9})
    assert written["config.json"]["vocab_size"] == 4
    assert written["config.json"]["eos_token_id"] == 2
    assert written["generation_config.json"] == {"eos_token_id": [2, 3], "top_k": 9}


def test_ids_that_the_config_leaves_to_its_class_move_too(tmp_path):
    # LlamaConfig's own defaults: bos 1 (cold here), eos 2 (compact id 0).
    written = write(tmp_path, {"model_type": "llama", "vocab_size": 37})
    assert written["config.json"]["bos_token_id"] is None
    assert written["config.json"]["eos_token_id"] == 0


def test_nested_vocab_size_is_set_where_the_model_reads_it(tmp_path):
    written = write(tmp_path, {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}})
    assert written["config.json"]["text_config"]["vocab_size"] == 4
