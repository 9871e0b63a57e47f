"""Rules of a generation config against the processors that transformers makes of them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimserve.decoding.columns import Columns, History
from trimserve.decoding.sampling import SamplingParams, choose, edit_logits
from trimserve.decoding.token_rules import TokenRules

V = 11
IDS = st.integers(0, V - 1)
SOME = st.lists(IDS, min_size=1, max_size=3)


def verdict(config, prompt, output, limit=20):
    rules = TokenRules.from_config(config, limit)
    return rules.at(np.array(prompt, np.int32), np.array(output, np.int32))


def banned(config, prompt, output, limit=20):
    return verdict(config, prompt, output, limit).banned.tolist()


def test_no_entries_are_no_rules():
    assert not TokenRules.from_config({}, 20)
    assert not TokenRules.from_config({"eos_token_id": 3, "bad_words_ids": None, "min_length": 0}, 20)
    assert not SamplingParams(rules=TokenRules()).edits_logits


def test_first_and_last_tokens_are_forced():
    config = {"forced_bos_token_id": 4, "forced_eos_token_id": [3, 5]}
    assert verdict(config, [2], []).forced.tolist() == [4]
    assert verdict(config, [2], [4]).forced.tolist() == []
    assert verdict(config, [2, 2], []).forced.tolist() == []  # a prompt of more than one token
    assert verdict(config, [2], [4, 1], limit=3).forced.tolist() == [3, 5]


def test_a_word_that_is_the_end_is_not_bad():
    assert banned({"bad_words_ids": [[3], [6]], "eos_token_id": 3}, [2], []) == [6]


def test_all_other_logits_fall_where_a_token_is_forced():
    columns = Columns(np.arange(V, dtype=np.int32), V)
    params = SamplingParams(rules=TokenRules(forced_bos_token_id=(4,)))
    history = History(np.array([2], np.int32), np.zeros(0, np.int32))
    logits = np.linspace(5, -5, V, dtype=np.float32)
    edited = edit_logits(logits, columns, params, history)
    assert edited[4] == 0
    assert np.isneginf(np.delete(edited, 4)).all()
    assert choose(logits, columns, params, history) == 4


CONFIGS = st.fixed_dictionaries(
    {"eos_token_id": SOME},
    optional={
        "forced_bos_token_id": IDS,
        "forced_eos_token_id": SOME,
        "suppress_tokens": SOME,
        "begin_suppress_tokens": SOME,
        "bad_words_ids": st.lists(SOME, min_size=1, max_size=4),
        "no_repeat_ngram_size": st.integers(1, 4),
        "min_length": st.integers(0, 8),
        "min_new_tokens": st.integers(0, 8),
    },
)


@pytest.mark.export
@settings(max_examples=300, deadline=None)
@given(
    config=CONFIGS,
    prompt=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    output=st.lists(st.integers(0, 3), max_size=9),
)
def test_allowed_tokens_are_those_of_transformers(config, prompt, output):
    """Few different ids in the history, so that words and runs do come twice."""
    limit = 10
    allowed = allowed_by_transformers(config, prompt, output, limit)
    found = verdict(config, prompt, output, limit)
    if found.forced.size:
        ours = set(found.forced.tolist())
        # Suppressing comes after forcing there; a config that does both to an id is a mistake.
        clash = {*config.get("suppress_tokens", ()), *config.get("begin_suppress_tokens", ())}
        assert allowed == ours - clash or clash & ours
    else:
        assert allowed == set(range(V)) - set(found.banned.tolist())


def allowed_by_transformers(config, prompt, output, limit):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    words = [
        word for word in config.get("bad_words_ids", ()) if word not in [[e] for e in config["eos_token_id"]]
    ]
    if "bad_words_ids" in config and not words:
        config = {key: value for key, value in config.items() if key != "bad_words_ids"}
    generation = transformers.GenerationConfig(**config)
    generation.max_length = len(prompt) + limit
    if generation.min_new_tokens is not None:  # as `generate` does before it makes processors
        generation.min_length = generation.min_new_tokens + len(prompt)
    generation._eos_token_tensor = torch.tensor(config["eos_token_id"])
    processors = transformers.GenerationMixin()._get_logits_processor(generation, len(prompt), device="cpu")
    scores = processors(torch.tensor([[*prompt, *output]]), torch.zeros(1, V))
    return set(torch.nonzero(scores[0] > -torch.inf).flatten().tolist())
