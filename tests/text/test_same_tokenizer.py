"""Two tokenizer.json that say the same in other words, and some that do not."""

import json
from copy import deepcopy

import pytest

from tests.support.tiny_tokenizers import KINDS
from trimserve.text.same_tokenizer import same_tokenizer

_TEXT_A = {"Sequence": {"id": "A", "type_id": 0}}
_TEXT_B = {"Sequence": {"id": "B", "type_id": 1}}
_NOTHING = {
    "type": "TemplateProcessing",
    "single": [_TEXT_A],
    "pair": [_TEXT_A, _TEXT_B],
    "special_tokens": {},
}


def _content(kind):
    return json.loads(KINDS[kind]().to_str())


def _special(token, type_id=0):
    return {"SpecialToken": {"id": token, "type_id": type_id}}


def _template(sep="[SEP]"):
    single = [_special("[CLS]"), _TEXT_A, _special(sep)]
    tokens = {
        name: {"id": name, "ids": [id_], "tokens": [name]} for name, id_ in (("[CLS]", 2), ("[SEP]", 3))
    }
    tokens["other"] = {"id": "other", "ids": [4], "tokens": ["other"]}
    pair = [*single, _TEXT_B, _special(sep, 1)]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("byte_level_bpe", lambda c: c.update(post_processor=_NOTHING)),
        ("byte_level_bpe", lambda c: c["model"].update(continuing_subword_prefix="", end_of_word_suffix="")),
        ("byte_level_bpe", lambda c: c.update(normalizer={"type": "Sequence", "normalizers": []})),
        ("wordpiece", lambda c: c.update(padding=None, truncation=None)),
        ("wordpiece", lambda c: c.update(post_processor=_template())),
        ("unigram", lambda c: c.update(decoder=c["decoder"]["decoders"][0])),
        (
            "unigram",
            lambda c: c["model"]["vocab"].__setitem__(9, ["at", c["model"]["vocab"][9][1] * (1 + 1e-15)]),
        ),
    ],
)
def test_the_same_in_other_words(kind, change):
    one = _content(kind)
    other = deepcopy(one)
    if kind == "unigram":
        one["model"]["vocab"][9][0] = other["model"]["vocab"][9][0] = "at"
    change(other)
    assert one != other
    assert same_tokenizer(json.dumps(one), json.dumps(other))


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("wordpiece", lambda c: c.update(post_processor=None)),
        ("wordpiece", lambda c: c.update(post_processor=_template("other"))),
        ("wordpiece", lambda c: c["normalizer"].update(lowercase=False)),
        ("wordpiece", lambda c: c["added_tokens"][4].update(lstrip=True)),
        ("wordpiece", lambda c: c["added_tokens"].pop()),
        ("wordpiece", lambda c: c["model"].update(unk_token="[MASK]")),
        ("byte_level_bpe", lambda c: c["model"]["merges"].reverse()),
        ("byte_level_bpe", lambda c: c["model"].update(end_of_word_suffix="</w>")),
        ("byte_level_bpe", lambda c: c["pre_tokenizer"].update(add_prefix_space=True)),
        ("byte_level_bpe", lambda c: c.update(normalizer={"type": "NFC"})),
        ("unigram", lambda c: c["model"]["vocab"][9].__setitem__(1, -4.75)),
        ("unigram", lambda c: c["normalizer"]["normalizers"].pop(0)),
        ("unigram", lambda c: c.update(decoder=None)),
    ],
)
def test_other_ids_or_other_text(kind, change):
    one = _content(kind)
    other = deepcopy(one)
    change(other)
    assert not same_tokenizer(json.dumps(one), json.dumps(other))
