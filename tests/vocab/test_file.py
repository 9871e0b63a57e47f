import dataclasses

import pytest

from trimserve.errors import MismatchError
from trimserve.vocab.file import load_vocab, save_vocab
from trimserve.vocab.map import VocabMap


@pytest.mark.parametrize(
    "rule",
    [
        {"reasons": {"ctructural": 3}},
        {"reasons": {"profile": "many"}},
        {"options": {"multiple_of": 0}},
        {"sources": [{"name": "a.txt"}]},
        {"coverage": "all"},
    ],
)
def test_a_rule_that_is_none_is_refused(tmp_path, rule):
    vocab = dataclasses.replace(VocabMap.everything(5), rule=rule)
    save_vocab(vocab, tmp_path / "v.safetensors")
    with pytest.raises(MismatchError, match=r"the rule of .*select the vocab again"):
        load_vocab(tmp_path / "v.safetensors")


def test_a_rule_may_say_more(tmp_path):
    vocab = dataclasses.replace(VocabMap.everything(5), rule={"reasons": {"profile": 5}, "grown": 2})
    save_vocab(vocab, tmp_path / "v.safetensors")
    assert load_vocab(tmp_path / "v.safetensors").rule == vocab.rule
