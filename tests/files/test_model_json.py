import json

import pytest

from trimserve.errors import MismatchError
from trimserve.files.model_json import read_model_json, read_modules


def read(folder, name, content):
    (folder / name).write_text(json.dumps(content))
    return read_model_json(folder / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        # As real models have them.
        ("config.json", {"model_type": "t5", "eos_token_id": [1, 106], "time_step_limit": [0, float("inf")]}),
        ("config.json", {"vocab_size": 1_000_000, "pad_token_id": -1, "intermediate_size": [1, 2]}),
        ("config.json", {"text_config": {"vocab_size": 8}, "decoder": {"type": "BPE"}, "torch_dtype": None}),
        ("config.json", {"id2label": {"0": "LABEL_0"}, "rope_scaling": None, "head_dim": None}),
        ("tokenizer_config.json", {"model_max_length": 1000000000000000019884624838656}),
        ("tokenizer_config.json", {"eos_token": {"__type": "AddedToken", "content": "</s>"}, "x": {}}),
        ("tokenizer_config.json", {"extra_special_tokens": {}, "chat_template": None}),
        ("generation_config.json", {"forced_decoder_ids": [[1, None]], "sequence_bias": [[[3], -1.0]]}),
        ("added_tokens.json", {"<think>": 5}),
        ("sentence_bert_config.json", {"max_seq_length": None, "do_lower_case": False}),
        ("unknown.json", {"vocab_size": "abc"}),
    ],
)
def test_what_models_have_is_read_whole(tmp_path, name, content):
    assert read(tmp_path, name, content) == content


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", {"vocab_size": "abc"}, "vocab_size"),
        ("config.json", {"vocab_size": -1}, "vocab_size"),
        ("config.json", {"vocab_size": 1e9}, "vocab_size"),
        ("config.json", {"vocab_size": 10**9}, "vocab_size"),
        ("config.json", {"vocab_size": True}, "vocab_size"),
        ("config.json", {"text_config": {"vocab_size": 0}}, "text_config.*vocab_size"),
        ("config.json", {"eos_token_id": [[1]]}, "eos_token_id"),
        ("config.json", {"architectures": {"a": 1}}, "architectures"),
        ("config.json", {"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ("config.json", [], "JSON object"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"a": {"content": "x"}}}, "Expected"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"1": {}}}, "content"),
        ("tokenizer_config.json", {"chat_template": [{"name": "default"}]}, "template"),
        ("special_tokens_map.json", {"additional_special_tokens": [3]}, "additional_special_tokens"),
        ("model.safetensors.index.json", {"weight_map": {}}, "weight_map"),
        ("model.safetensors.index.json", {"weight_map": {"a": 1}}, "weight_map"),
        ("config_sentence_transformers.json", {"prompts": {"a": 1}}, "prompts"),
        ("genai_config.json", {"model": {"decoder": []}}, "decoder"),
        ("adapter_config.json", {"base_model_name_or_path": 3}, "base_model_name_or_path"),
    ],
)
def test_what_is_refused(tmp_path, name, content, words):
    with pytest.raises(MismatchError, match=f"{name}.*{words}.*fetch the model again"):
        read(tmp_path, name, content)


def test_modules(tmp_path):
    path = tmp_path / "modules.json"
    path.write_text('[{"idx": 0, "name": "0", "path": "", "type": "a.Transformer"}]')
    assert read_modules(path)[0].type == "a.Transformer"
    for content in ("{}", "[3]", '[{"path": ""}]', '[{"path": 1, "type": "a"}]', ""):
        path.write_text(content)
        with pytest.raises(MismatchError, match=r"modules\.json"):
            read_modules(path)
