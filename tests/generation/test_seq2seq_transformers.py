"""Encoder-decoders exported by transformers' exporter, against transformers in torch.

What the runtime does with such graphs is tested in test_seq2seq.py; here it is the graphs that are.
"""

import numpy as np
import pytest

pytest.importorskip("torch")

import onnx_ir as ir
import torch
import transformers

from tests.support.folders import make_vocab
from tests.support.models import needs_transformers_5
from tests.support.rounding import assert_within, model_bound
from tests.support.translators import (
    FAMILIES,
    HIDDEN,
    KEPT,
    LATER_FAMILIES,
    TASK,
    Translator,
    V,
    save_translator,
)
from trimserve.errors import UnsupportedModelError
from trimserve.model.resolve import resolve_model
from trimserve_export import export
from trimserve_export.checkpoint.axes import load_config
from trimserve_export.exporters.choice import choose_exporter
from trimserve_export.exporters.exporter import GraphJob, load_exporter
from trimserve_export.exporters.transformers_seq2seq import COMPARED
from trimserve_export.verify import verify

pytestmark = [pytest.mark.export, needs_transformers_5]

# Of unequal lengths, one longer than what is traced.
TEXTS = ["the cat sat on the mat", "dog", "a cat ? un latte on a dog .", "lo", "a cat sat on a dog ? " * 3]
TOKENS = 15
# Its positions are relative, so that a wrong length of the past shows; tracing a family takes a while.
FAST = ("t5",)
# LongT5's local attention fixes the length of the source in its graph.
SLOW = sorted({*FAMILIES, *LATER_FAMILIES} - {*FAST, "longt5"})


def make(root, family: str, **options) -> Translator:
    """Without the untrimmed graphs, which cost as much again: `verify` makes them where it is asked."""
    model = save_translator(family, root / "model")
    source = resolve_model(model)
    vocab = make_vocab(KEPT, source.vocab_size, source.tokenizer_sha256)
    export(source, vocab, root / "trimmed", exporter="transformers", progress=False, **options)
    return Translator(model, root / "trimmed", root / "full")


@pytest.fixture(
    scope="module", params=[*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def translator(request, tmp_path_factory):
    return make(tmp_path_factory.mktemp(request.param), request.param)


def test_ids_alone_and_in_a_batch_are_those_of_transformers(translator):
    expected = [translator.by_torch(text, TOKENS) for text in TEXTS]
    alone = [translator.generator.generate(text, max_new_tokens=TOKENS)[0] for text in TEXTS]
    assert [list(result.ids) for result in alone] == expected
    together = translator.generator.generate(TEXTS, max_new_tokens=TOKENS)
    assert [list(result.ids) for result in together] == expected
    assert translator.is_cold(np.concatenate(expected)).any(), "no cold token: a wrong slot would not be seen"
    assert any(translator.is_cold(translator.encode(text)).any() for text in TEXTS)


def test_beams_are_those_of_transformers(translator):
    found = translator.generator.generate(TEXTS, max_new_tokens=TOKENS, num_beams=3)
    expected = [translator.by_torch(text, TOKENS, num_beams=3) for text in TEXTS]
    assert [list(result.ids) for result in found] == expected


def test_scores_are_the_log_probabilities_of_transformers(translator):
    targets = [*TEXTS[1:], TEXTS[0]]
    for source, score in zip(TEXTS, translator.generator.score(targets, TEXTS), strict=True):
        fed = {"input_ids": translator.encode(source), "decoder_input_ids": score.ids[:-1]}
        tensors = {name: torch.tensor(ids[None].astype(np.int64)) for name, ids in fed.items()}

        def logits(model, tensors=tensors):
            return model(**tensors).logits

        with torch.inference_mode():
            table = logits(translator.torch_model).double().log_softmax(-1)[0].numpy()
        expected = table[np.arange(len(score.ids) - 1), score.ids[1:]]
        bound = model_bound(translator.torch_model, logits, draws=2)
        assert_within(score.log_probs, expected, 2 * bound, rows=0)


def test_each_vocab_matrix_is_stored_once_for_both_graphs(translator):
    places = {}
    for name in ("encoder_model.onnx", "decoder_model.onnx"):
        weights = ir.load(translator.path / name).graph.initializers.values()
        tables = [weight.const_value for weight in weights if set(weight.shape) == {len(KEPT), HIDDEN}]
        places[name] = {(tensor.location, tensor.offset) for tensor in tables}
    (embedding,) = places["encoder_model.onnx"]
    tied = translator.torch_model.config.tie_word_embeddings
    assert embedding in places["decoder_model.onnx"]
    assert len(places["decoder_model.onnx"]) == 1 + (not tied)


def test_the_cross_attention_is_computed_with_the_encoder(translator):
    encoder, decoder = (
        ir.load(translator.path / f"{part}_model.onnx").graph for part in ("encoder", "decoder")
    )
    cross = [f"{layer}.encoder.{kind}" for layer in range(2) for kind in ("key", "value")]
    own = [name.replace("encoder", "decoder") for name in cross]
    assert [value.name for value in encoder.outputs] == [
        "last_hidden_state",
        *(f"present.{name}" for name in cross),
    ]
    assert [value.name for value in decoder.outputs if "present" in str(value.name)] == [
        f"present.{name}" for name in own
    ]
    fed = {value.name: value for value in decoder.inputs}
    assert {name for name in fed if "past" in name} == {f"past_key_values.{name}" for name in cross + own}
    assert "encoder_hidden_states" not in fed
    assert str(fed["past_key_values.0.encoder.key"].shape) == "[batch_size,2,encoder_sequence_length,8]"
    assert str(fed["past_key_values.0.decoder.key"].shape) == "[batch_size,2,past_sequence_length,8]"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("m2m_100", {}),
        ("t5", {"quantize": "int8"}),
        ("bart", {"quantize": "int4"}),
        ("mt5", {"dtype": "fp16"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value.values()) or "fp32",
)
def test_what_export_makes_is_verified(tmp_path, family, options):
    made = make(tmp_path, family, **options)
    assert all(result.ids for result in made.generator.generate(TEXTS, max_new_tokens=TOKENS))
    result = verify(made.path, made.source, store=False, progress=False)
    assert result.ok, result.failed
    assert result.checks[-1].name == "source" or options


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_auto_takes_it(tmp_path, family):
    config = load_config(save_translator(family, tmp_path / "model"))
    assert choose_exporter("auto", config, GraphJob(TASK)).name == "transformers"


def test_models_without_a_class_for_the_task_are_refused():
    with pytest.raises(UnsupportedModelError, match="has no text2text-generation-with-past class for 'bert'"):
        load_exporter("transformers").check_model(transformers.BertConfig(vocab_size=V), TASK)


def test_other_encoder_decoders_are_refused_by_name():
    """Their graphs were not compared with torch: LongT5's takes sources of one length alone."""
    for config in (transformers.LongT5Config(vocab_size=V), transformers.BigBirdPegasusConfig(vocab_size=V)):
        with pytest.raises(UnsupportedModelError, match=f"not for '{config.model_type}' models"):
            load_exporter("transformers").check_model(config, TASK)


def test_every_model_type_that_is_taken_is_compared_here():
    classes = [(FAMILIES | LATER_FAMILIES)[family][0] for family in (*FAST, *SLOW)]
    types = {getattr(transformers, name).config_class.model_type for name in classes}
    assert types == COMPARED
