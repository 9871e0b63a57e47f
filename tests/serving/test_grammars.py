"""Answers by a grammar: what it allows, and the full model's choice among that, cold ids included."""

import json
import re

import numpy as np
import pytest

pytest.importorskip("llguidance")
pytest.importorskip("openai")
pytest.importorskip("torch")
pytest.importorskip("uvicorn")

import openai

from trimserve.loading import load
from trimserve.serving.grammars import Grammars, choice_grammar, json_grammar

pytestmark = pytest.mark.export
MESSAGES = [{"role": "user", "content": "the cat sat on"}]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "word": {"enum": ["cat", "dog"]}},
    "required": ["ok", "word"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def model(folders):
    return load(folders["chat"], threads=1)


def ask(client, **fields):
    answer = client.chat.completions.create(
        model="chat", messages=MESSAGES, max_tokens=200, temperature=1, seed=4, **fields
    )
    return answer.choices[0]


def test_json_schema(client):
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
    choice = ask(client, response_format=format_, logit_bias={"220": -100})
    assert choice.finish_reason == "stop"
    found = json.loads(choice.message.content)
    assert set(found) == {"ok", "word"}
    assert found["word"] in ("cat", "dog")


def test_regex_choice_and_lark(client):
    for asked, pattern in (
        ({"regex": "[0-9]{3}-[a-c]{2}"}, "[0-9]{3}-[a-c]{2}"),
        ({"choice": ["yes", 'a "no"']}, 'yes|a "no"'),
        ({"grammar": 'start: "x" /[0-9]/ "y"'}, "x[0-9]y"),
    ):
        choice = ask(client, extra_body={"structured_outputs": asked})
        assert re.fullmatch(pattern, choice.message.content)


def test_a_wrong_grammar_is_named(client):
    for fields in (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "nothing"}},
            }
        },
        {"response_format": {"type": "poem"}},
        {"extra_body": {"structured_outputs": {"regex": "("}}},
        {"extra_body": {"structured_outputs": {"regex": "a", "choice": ["b"]}}},
        {"extra_body": {"structured_outputs": {}}},
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, **fields)
        assert caught.value.param == (
            "response_format" if "response_format" in fields else "structured_outputs"
        )


def test_exact_mode_follows_the_full_model_under_the_mask(model):
    """Greedy: each token is the largest logit of the full vocab among the ids that the grammar allows."""
    grammar = json_grammar(SCHEMA, "test")
    prompt = model.chat_ids(MESSAGES)
    mask = Grammars(model).mask(grammar, "test")
    made = model.chat(MESSAGES, max_new_tokens=60, temperature=0, logits_processor=mask)
    cold_seen = 0
    mask = Grammars(model).mask(grammar, "test")
    head = model.folder.vocab.head
    for step in range(len(made.ids)):
        fed = np.concatenate([prompt, np.array(made.ids[:step], np.int32)])
        logits = full_logits(model, fed)
        allowed = mask.allowed(np.array(made.ids[:step], np.int32))
        best = np.where(allowed, logits, -np.inf).max()
        assert allowed[made.ids[step]]
        assert logits[made.ids[step]] >= best - 1e-4
        cold_seen += not head.is_kept(np.array([made.ids[step]]))[0]
    assert made.stopped in ("eos", "length")


def full_logits(model, ids):
    slotted = model.folder.vocab.with_slots(ids[None])
    cache = model.decoder.start([None])
    step = model.decoder.step(cache, slotted.ids, model.cold.embeddings(slotted.cold_ids))
    full = np.empty(model.folder.vocab.vocab_size, np.float32)
    full[model.folder.vocab.head.kept_ids] = step.logits[0, -1]
    head = model.cold_head("test")
    full[head.cold_ids] = head.logits(step.hidden[0, -1:])[0]
    return full


def test_a_mask_goes_back_to_where_drafts_branch_off(model):
    texts = ["abab", "abba", "ab", "ba"]
    ids = [model.codec.encode([text], add_special_tokens=False)[0] for text in texts]
    grammar = choice_grammar(texts)
    mask = Grammars(model).mask(grammar, "test")
    for text in ids * 2:
        for end in (*range(len(text) + 1), 1, 0):
            fresh = Grammars(model).mask(grammar, "test")
            assert np.array_equal(mask.allowed(text[:end]), fresh.allowed(text[:end]))


def test_what_no_grammar_allows_leaves_the_end_alone(model):
    mask = Grammars(model).mask(choice_grammar(["yes"]), "test")
    (no,) = model.codec.encode(["no"], add_special_tokens=False)
    assert set(np.flatnonzero(mask.allowed(no))) == set(model.stop_ids)
    (yes,) = model.codec.encode(["yes"], add_special_tokens=False)
    assert set(np.flatnonzero(mask.allowed(yes))) == set(model.stop_ids)
