import json

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.support.tiny_tokenizers import CHAT_TEMPLATE, KINDS, byte_level_bpe, save_model_folder
from trimserve.errors import MismatchError
from trimserve.folder.positions import PAD_POSITION_MODELS
from trimserve.model.resolve import resolve_model
from trimserve.model.structural import (
    config_ids,
    pad_position_ids,
    structural_ids,
    template_ids,
    template_literals,
)
from trimserve.text.tokenizer import byte_ids, newline_ids


def structural(folder):
    return set(structural_ids(resolve_model(folder)).tolist())


def test_sorted_int32_below_the_vocab_size(model_folder):
    source = resolve_model(model_folder)
    ids = structural_ids(source)
    assert ids.dtype == np.int32
    assert (np.diff(ids) > 0).all()
    assert 0 <= ids[0] <= ids[-1] < source.vocab_size


def test_added_tokens_and_those_around_a_text_stay(model_folder):
    tokenizer = resolve_model(model_folder).tokenizer()
    kept = structural(model_folder)
    assert kept >= set(tokenizer.get_added_tokens_decoder())
    assert kept >= set(tokenizer.encode("").ids)
    assert kept >= set(tokenizer.encode("", "").ids)


def test_any_text_can_be_spelled_with_structural_ids_of_byte_tokenizers(model_folders):
    for kind in ("byte_level_bpe", "sentencepiece_bpe", "unigram_bytes"):
        tokenizer = KINDS[kind]()
        assert len(set(byte_ids(tokenizer))) == 256
        assert structural(model_folders[kind]) >= set(byte_ids(tokenizer))
    assert not list(byte_ids(KINDS["wordpiece"]()))
    assert not list(byte_ids(KINDS["unigram"]()))


def test_unk_stays_whatever_its_id_and_even_if_it_is_not_special(tmp_path):
    folder = save_model_folder("unigram", tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] == "<mask>"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert content["model"]["unk_id"] == 3
    assert 3 in structural(folder)


def test_post_processor_ids_stay_even_if_they_are_not_added_tokens(tmp_path):
    folder = save_model_folder("wordpiece", tmp_path)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert {2, 3} <= structural(folder)  # BertProcessing: [CLS], [SEP]
    sequence = {"type": "Sequence", "processors": [content["post_processor"]]}
    (folder / "tokenizer.json").write_text(json.dumps(content | {"post_processor": sequence}))
    assert {2, 3} <= structural(folder)


def test_config_ids_in_lists_and_nested_configs():
    config = {
        "eos_token_id": [20, 21],
        "pad_token_id": None,
        "vocab_size": 36,
        "text_config": {"bos_token_id": 22, "num_layers": 2},
        "image_token_index": 23,
        "forced_decoder_ids": [[1, 24], [2, None]],
        "suppress_tokens": [25],
        "bad_words_ids": [[26, 27], [28]],
        "sequence_bias": [[[29], -1.5]],
        "decoder_start_token_id": 30,
        "use_cache": True,
        "mask_token_ids": [31],
    }
    assert sorted(config_ids(config)) == [*range(20, 32)]


def test_ids_of_both_configs_stay_and_those_beyond_the_rows_do_not(tmp_path):
    folder = save_model_folder("wordpiece", tmp_path, forced_bos_token_id=30, eos_token_id=37)
    (folder / "generation_config.json").write_text(json.dumps({"suppress_tokens": [-1, 31, 36, 99]}))
    ids = structural(folder)
    assert {30, 31, 36} <= ids
    assert max(ids) == 36


def _added(content):
    """A token as transformers writes it."""
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"__type": "AddedToken", "content": content, **flags}


def test_tokens_that_the_tokenizer_config_names_stay(tmp_path):
    folder = save_model_folder("wordpiece", tmp_path)
    before = structural(folder)
    settings = {"eos_token": "dog", "pad_token": _added("cat"), "additional_special_tokens": ["mat"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = resolve_model(folder).tokenizer()
    assert structural(folder) - before == {tokenizer.token_to_id(token) for token in ("dog", "cat", "mat")}


@pytest.mark.parametrize(
    ("kind", "pieces"),
    [
        ("byte_level_bpe", {"Ċ", "č", "ĊĊ"}),
        ("sentencepiece_bpe", {"<0x0A>"}),
        ("unigram_bytes", {"<0x0A>"}),
        ("unigram", set()),  # newlines become spaces
        ("wordpiece", set()),
    ],
)
def test_newline_tokens(kind, pieces):
    tokenizer = KINDS[kind]()
    assert {tokenizer.id_to_token(id_) for id_ in newline_ids(tokenizer)} <= pieces
    assert bool(newline_ids(tokenizer)) == bool(pieces)


def test_template_literals():
    template = (
        "{# a 'comment' #}<s>{%- if message['role'] == \"user\" -%}[INST] it's\n"
        "{{ m.content|trim + '\\n\\n' }}{{ 'it\\'s' }}{% endif %}"
    )
    assert template_literals(template) == {"<s>", "role", "user", "[INST] it's\n", "\n\n", "it's"}
    assert template_literals("") == set()


def test_what_a_chat_renders_around_its_messages_is_structural(model_folders):
    jinja2 = pytest.importorskip("jinja2")
    messages = [{"role": role, "content": ""} for role in ("system", "user", "assistant", "tool")]
    rendered = jinja2.Template(CHAT_TEMPLATE).render(messages=messages, add_generation_prompt=True)
    for kind in ("byte_level_bpe", "sentencepiece_bpe"):
        ids = resolve_model(model_folders[kind]).tokenizer().encode(rendered).ids
        assert structural(model_folders[kind]) >= set(ids)


def test_templates_in_files_and_named_templates_are_read(tmp_path):
    def kept_of(kind, content):
        folder = save_model_folder("byte_level_bpe", tmp_path / kind)
        (folder / "tokenizer_config.json").write_text("{}")
        if kind == "jinja":
            (folder / "chat_template.jinja").write_text(content)
        elif kind == "additional":
            (folder / "additional_chat_templates").mkdir()
            (folder / "additional_chat_templates" / "rag.jinja").write_text(content)
        elif kind == "named":
            named = {"chat_template": [{"name": "default", "template": content}]}
            (folder / "tokenizer_config.json").write_text(json.dumps(named))
        return structural(folder)

    word = byte_level_bpe().encode("total").ids
    assert len(word) < 5  # merged, so not in the byte alphabet alone
    assert not set(word) <= kept_of("none", "")
    for kind in ("jinja", "additional", "named"):
        assert set(word) <= kept_of(kind, "{{ 'total' }}")
    (tmp_path / "jinja" / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(MismatchError, match=r"chat_template\.jinja"):
        structural(tmp_path / "jinja")


def test_no_template_adds_no_role_names():
    assert not list(template_ids(byte_level_bpe(), []))
    user = set(byte_level_bpe().encode("user").ids)
    assert user <= set(template_ids(byte_level_bpe(), ["{{ x }}y"]))


@pytest.mark.parametrize(
    "model_type", sorted(PAD_POSITION_MODELS & {"roberta", "xlm-roberta", "mpnet", "esm"})
)
def test_ids_up_to_pad_stay_where_positions_come_from_pad(tmp_path, model_type):
    # Position ids are cumsum(mask) + pad, so the compact id of pad must be pad itself.
    folder = save_model_folder("wordpiece", tmp_path, model_type=model_type, pad_token_id=9)
    assert set(range(10)) <= structural(folder)
    assert np.array_equal(structural_ids(resolve_model(folder))[:10], np.arange(10))


def test_pad_does_not_matter_to_other_models(tmp_path):
    folder = save_model_folder("wordpiece", tmp_path, model_type="bert", pad_token_id=9)
    assert 8 not in structural(folder)
    nested = {"model_type": "wrapper", "text_config": {"model_type": "roberta"}}
    (folder / "config.json").write_text(json.dumps(nested | {"vocab_size": 37}))
    assert pad_position_ids(resolve_model(folder)) == range(2)  # their default pad is 1


def library_ids(folder, text):
    transformers = pytest.importorskip("transformers", reason="asks transformers which ids are right")
    return transformers.AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "count", "tokens"),
    [
        ("qwen2", 369, ["Ċ", "<|im_end|>", "system", "user", "assistant", "ĊĊ", "Ā"]),
        ("gpt2", 258, ["Ċ", "<|endoftext|>", "ĊĊ"]),
        ("phi3", 294, ["<0x0A>", "<unk>", "▁user", "<|assistant|>"]),
        ("xlm-roberta", 5, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]),
        ("t5-small", 103, ["<pad>", "</s>", "<unk>", "<extra_id_0>", "<extra_id_99>"]),
        ("bert-uncased", 5, ["[CLS]", "[PAD]", "[UNK]"]),
        ("mbert-cased", 5, ["[CLS]", "[SEP]", "[MASK]"]),
    ],
)
def test_real_tokenizers(data_dir, name, count, tokens):
    folder = data_dir / "tokenizers" / name
    ids = structural(folder)
    # A role after a space: transformers 4 puts a second one before it, which is a token of its own in phi3,
    # and transformers 5 does not. The ids follow the library that is there.
    doubled = set(library_ids(folder, "  user")) & {259} if name == "phi3" else set()
    assert len(ids) == count + len(doubled)
    assert doubled <= ids
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert {tokenizer.token_to_id(token) for token in tokens} <= ids
