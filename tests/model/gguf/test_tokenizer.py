import json

import numpy as np
import pytest

from tests.support import tiny_tokenizers
from tests.support.gguf_files import Written
from tests.support.gguf_models import read_document, tokenizer_fields, write_bare_llama
from tests.support.gguf_texts import HOSTILE, random_texts
from tests.support.llama_cpp import LlamaCpp
from trimserve.errors import MismatchError, UnsupportedModelError
from trimserve.files.gguf import read_gguf
from trimserve.model.gguf.pre_tokenizers import PRE_TOKENIZERS
from trimserve.model.gguf.tokenizer import read_tokenizer
from trimserve.text.tokenizer import parse_tokenizer

SPECIALS = ["<|turn|>", "<|end|>", "<think>", "<s>"]
KEYS = {"types": "token_type"}  # where the name in the file is another


def written(fields, **more):
    """The metadata of a vocab alone; keys of `more` replace it, None leaves it out."""
    found = {f"tokenizer.ggml.{KEYS.get(key, key)}": value for key, value in fields.items()}
    for key in ("tokenizer.ggml.token_type", "tokenizer.ggml.scores"):
        if key in found:
            kind = np.float32 if key.endswith("scores") else np.int32
            found[key] = np.array(found[key], kind)
    found |= more
    return Written([(key, value) for key, value in found.items() if value is not None])


def tokenizer_of(fields, tmp_path, **more):
    return read_tokenizer(read_gguf(written(fields, **more).write(tmp_path / "m.gguf")))


def byte_level():
    return tokenizer_fields(json.loads(tiny_tokenizers.byte_level_bpe().to_str()), pre="gpt-2")


def sentencepiece():
    document = json.loads(tiny_tokenizers.sentencepiece_bpe().to_str())
    made = {"".join(pair): -float(rank) for rank, pair in enumerate(map(tuple, document["model"]["merges"]))}
    scores = [made.get(token, -1000.0) for token in tokenizer_fields(document)["tokens"]]
    return tokenizer_fields(document, scores=scores)


def test_byte_level_ids_are_the_original_tokenizers(tmp_path):
    original = tiny_tokenizers.byte_level_bpe()
    made = parse_tokenizer(tokenizer_of(byte_level(), tmp_path).content)
    old = [text for text in (*HOSTILE, *random_texts(300, SPECIALS)) if all(ord(c) < 0x2FA20 for c in text)]
    texts = [text for text in old if "\u1c89" not in text]  # a letter of Unicode 16
    assert len(texts) > 150
    for text in texts:
        ids = original.encode(text).ids
        assert made.encode(text).ids == ids, text
        assert made.decode(ids, skip_special_tokens=False) == original.decode(ids, skip_special_tokens=False)


def test_sentencepiece_ids_are_the_original_tokenizers(tmp_path):
    original = tiny_tokenizers.sentencepiece_bpe()
    tokenizer = tokenizer_of(sentencepiece(), tmp_path)
    made = parse_tokenizer(tokenizer.content)
    for text in (*HOSTILE, *random_texts(300, SPECIALS)):
        for special in (False, True):  # bos by default, as llama.cpp has it
            expected = original.encode(text, add_special_tokens=special).ids
            assert made.encode(text, add_special_tokens=special).ids == expected, text
        assert made.decode(expected) == original.decode(expected)


def test_sentencepiece_merges_by_score_and_not_by_id(tmp_path):
    original, fields = tiny_tokenizers.sentencepiece_bpe(), sentencepiece()
    first = 259  # after unk, bos, eos and the bytes
    for key in ("tokens", "types", "scores"):
        fields[key] = fields[key][:first] + fields[key][: first - 1 : -1]
    made = parse_tokenizer(tokenizer_of(fields, tmp_path).content)
    for text in (*HOSTILE, *random_texts(100, SPECIALS), tiny_tokenizers.TEXT):
        assert made.encode(text).tokens == original.encode(text).tokens, text


def gemma_like(longest=7):
    """Runs of spaces of one score, the highest, as Gemma has them; the first merge of all has it, too."""
    fields = sentencepiece()
    runs = ["▁" * length for length in range(2, longest + 1)]
    fields["tokens"] += runs
    fields["types"] += [4] * len(runs)
    fields["scores"] += [0.0] * len(runs)
    return fields


def test_runs_of_spaces_begin_with_the_longest(tmp_path):
    tokenizer = tokenizer_of(gemma_like(), tmp_path, **{"tokenizer.ggml.add_space_prefix": False})
    made = parse_tokenizer(tokenizer.content)
    for length, expected in ((2, [2]), (7, [7]), (8, [7, 1]), (9, [7, 2]), (30, [7, 7, 7, 7, 2])):
        tokens = made.encode(" " * length, add_special_tokens=False).tokens
        assert [len(token) for token in tokens] == expected
        assert made.encode("a" + " " * length, add_special_tokens=False).tokens[1:] == tokens


def test_two_tokens_of_one_score_are_refused(tmp_path):
    fields = sentencepiece()
    place = fields["scores"].index(-3.0)
    fields["scores"][place] = -2.0
    with pytest.raises(UnsupportedModelError, match=f"'{fields['tokens'][place]}'.*the same score, -2.0"):
        _ = tokenizer_of(fields, tmp_path).content


def test_a_token_with_a_character_that_is_none_is_refused(tmp_path):
    fields = sentencepiece()
    fields["tokens"][fields["tokens"].index("at")] = "aŻ"
    with pytest.raises(UnsupportedModelError, match="'aŻ' and none for 'Ż'"):
        _ = tokenizer_of(fields, tmp_path).content


def test_no_prefix_space_where_the_file_says_so(tmp_path):
    tokenizer = tokenizer_of(sentencepiece(), tmp_path, **{"tokenizer.ggml.add_space_prefix": False})
    made = parse_tokenizer(tokenizer.content)
    assert made.encode("the", add_special_tokens=False).tokens[0][0] == "t"
    assert made.decode(made.encode(" the cat", add_special_tokens=False).ids) == " the cat"


@pytest.mark.parametrize(("pre", "bos"), [("llama-bpe", True), ("gpt-2", False), ("tekken", True)])
def test_bos_is_added_where_the_name_or_the_file_says_so(pre, bos, tmp_path):
    fields = byte_level() | {"pre": pre}
    count = len(fields["tokens"])
    ids = {"tokenizer.ggml.bos_token_id": count - 1, "tokenizer.ggml.eos_token_id": count - 2}
    made = parse_tokenizer(tokenizer_of(fields, tmp_path, **ids).content)
    plain = made.encode("a", add_special_tokens=False).ids
    assert made.encode("a").ids == ([count - 1] if bos else []) + plain
    both = {"tokenizer.ggml.add_bos_token": not bos, "tokenizer.ggml.add_eos_token": True}
    made = parse_tokenizer(tokenizer_of(fields, tmp_path, **ids, **both).content)
    assert made.encode("a").ids == ([] if bos else [count - 1]) + plain + [count - 2]


def test_named_tokens_and_templates_go_into_the_settings(tmp_path):
    fields, keys = byte_level(), "tokenizer.ggml."
    named = {f"{keys}bos_token_id": 5, f"{keys}eos_token_id": 6, f"{keys}padding_token_id": 1 << 20}
    tokenizer = tokenizer_of(fields, tmp_path, **named, **{"tokenizer.chat_template": "{{ x }}"})
    settings = tokenizer.settings
    assert (settings["bos_token"], settings["eos_token"]) == (fields["tokens"][5], fields["tokens"][6])
    assert "pad_token" not in settings
    assert settings["chat_template"] == "{{ x }}"
    # What ends a turn ends an answer, too.
    ends = [fields["tokens"][id_] for id_ in tokenizer.end_ids]
    assert ends == [fields["tokens"][6], "<|endoftext|>", "<|end|>"]
    more = {"": "a", ".tool_use": "b", "s": ["tool_use"]}
    templates = tokenizer_of(
        fields, tmp_path, **{f"tokenizer.chat_template{name}": value for name, value in more.items()}
    ).settings["chat_template"]
    assert templates == [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]


def test_a_token_that_ends_a_turn_is_special_whatever_its_type(tmp_path):
    fields = byte_level()
    place = fields["tokens"].index("<|end|>")
    fields["types"][place] = 1
    made = parse_tokenizer(tokenizer_of(fields, tmp_path).content)
    assert made.encode("a<|end|>").ids[-1] == place
    assert made.get_added_tokens_decoder()[place].special


def test_nothing_merges_across_a_byte_that_is_no_token(tmp_path):
    fields = byte_level()
    fields["tokens"][fields["tokens"].index("ē")] = "<gone>"  # how the byte 0x13 is written
    fields["merges"] = [merge for merge in fields["merges"] if "ē" not in merge]
    made = parse_tokenizer(tokenizer_of(fields, tmp_path).content)
    merged = made.encode("he").ids
    assert len(merged) == 1
    assert made.encode("h\x13e").ids == made.encode("h").ids + made.encode("e").ids != merged


BROKEN = {
    "another kind": ({"tokenizer.ggml.model": "bert"}, UnsupportedModelError, "'bert'.*gpt2.*llama"),
    "a name that is not known": (
        {"tokenizer.ggml.pre": "kimi-k2"},
        UnsupportedModelError,
        "'kimi-k2'.*qwen2",
    ),
    "no name": ({"tokenizer.ggml.pre": None}, UnsupportedModelError, "no tokenizer.ggml.pre"),
    "a token twice": ({"tokenizer.ggml.tokens": ["a", "a"]}, MismatchError, "twice"),
    "no token": ({"tokenizer.ggml.tokens": []}, MismatchError, "no tokens"),
    "too few types": ({"tokenizer.ggml.token_type": np.array([1, 1])}, MismatchError, "320 numbers"),
    "a merge of no tokens": ({"tokenizer.ggml.merges": ["zz qq"]}, MismatchError, "'zz qq'.*no token"),
    "merges missing": ({"tokenizer.ggml.merges": None}, MismatchError, "no tokenizer.ggml.merges"),
    "bos without an id": (
        {"tokenizer.ggml.add_bos_token": "yes"},
        MismatchError,
        "should be true or false",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_cannot_be_read_is_refused_in_one_sentence(what, tmp_path):
    changes, error, message = BROKEN[what]
    with pytest.raises(error, match=message) as caught:
        _ = tokenizer_of(byte_level(), tmp_path, **changes).content
    assert "\n" not in str(caught.value)


def test_scores_that_are_no_numbers_are_refused(tmp_path):
    fields = sentencepiece()
    fields["scores"][7] = float("nan")
    with pytest.raises(MismatchError, match="no number"):
        _ = tokenizer_of(fields, tmp_path).content


# llama.cpp itself.


def compare(path, count):
    """Ids of hostile and random texts, with and without bos and eos."""
    tokenizer = read_tokenizer(read_gguf(path))
    made, theirs = parse_tokenizer(tokenizer.content), LlamaCpp(path)
    specials = [tokenizer.tokens[id_] for id_, type_ in enumerate(tokenizer.types) if type_ in (2, 3, 4)][:50]
    for text in (*HOSTILE, *random_texts(count, specials)):
        for special in (False, True):
            expected = theirs.ids(text, add_special=special)
            assert made.encode(text, add_special_tokens=special).ids == expected, text


@pytest.mark.realmodel
@pytest.mark.parametrize("space", [True, False])
def test_sentencepiece_ids_are_llama_cpps(space, tmp_path):
    pytest.importorskip("gguf")
    path = write_bare_llama(
        tmp_path / "m.gguf", sentencepiece(), bos=1, eos=2, unknown=0, add_space_prefix=space
    )
    compare(path, 200)


@pytest.mark.realmodel
def test_runs_of_spaces_are_llama_cpps(tmp_path):
    pytest.importorskip("gguf")
    path = write_bare_llama(
        tmp_path / "m.gguf", gemma_like(), bos=1, eos=2, unknown=0, add_space_prefix=False
    )
    compare(path, 100)
    made, theirs = parse_tokenizer(read_tokenizer(read_gguf(path)).content), LlamaCpp(path)
    for text in (
        lead + " " * length + word for length in range(40) for lead in ("", "a") for word in ("", "the", "s")
    ):
        assert made.encode(text, add_special_tokens=False).ids == theirs.ids(text, add_special=False), text


@pytest.mark.realmodel
@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_byte_level_ids_are_llama_cpps(pre, tmp_path):
    pytest.importorskip("gguf")
    compare(write_bare_llama(tmp_path / "m.gguf", byte_level() | {"pre": pre}, bos=316, eos=316), 100)


@pytest.mark.realmodel
@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "pre"), [("qwen2", "qwen2"), ("qwen2", "llama-bpe"), ("gpt2", "gpt-2"), ("phi3", None)]
)
def test_ids_of_whole_vocabs_are_llama_cpps(name, pre, tmp_path, data_dir):
    pytest.importorskip("gguf")
    fields = tokenizer_fields(read_document(data_dir / "tokenizers" / name / "tokenizer.json"), pre=pre)
    named = "Phi-3 mini" if name == "phi3" else name  # phi3's special tokens take the spaces after them
    compare(write_bare_llama(tmp_path / "m.gguf", fields, name=named, bos=1, eos=2), 200)
