"""Encoder-decoders against transformers in torch (greedy) and the untrimmed graphs (sampling)."""

import json
import shutil

import numpy as np
import pytest

pytest.importorskip("torch")

import onnx_ir as ir
import onnxruntime as ort
import torch
import transformers

from tests.support import translators as families
from tests.support.folders import make_vocab
from tests.support.rounding import assert_within, model_bound
from tests.support.translators import (
    FAMILIES,
    HIDDEN,
    KEPT,
    TASK,
    V,
    make_translator,
    rehash,
    save_translator,
    with_generation_config,
)
from trimserve.cli.main import main
from trimserve.errors import UnsupportedModelError, UsageError
from trimserve.files.tensors import read_header
from trimserve.folder.names import COLD_NAME
from trimserve.generation.text2text import Text2TextGenerator
from trimserve.loading import load
from trimserve_export import export
from trimserve_export.checkpoint.tasks import infer_task
from trimserve_export.exporters.exporter import load_exporter
from trimserve_export.verify import verify

pytestmark = [
    pytest.mark.export,
    pytest.mark.filterwarnings("ignore:Moving the following attributes"),
]

TEXTS = ["the cat sat on the mat", "dog", "a cat ? un latte on a dog .", "lo"]
FAST = ("t5", "mt5", "bart", "mbart", "marian", "m2m_100")


@pytest.fixture(params=FAST)
def translator(request, translators):
    return translators(request.param)


@pytest.mark.optimum
def test_greedy_ids_equal_those_of_transformers(translator):
    check_greedy(translator)


def check_greedy(translator):
    results = [translator.generator.generate(text, max_new_tokens=25)[0] for text in TEXTS]
    assert [list(result.ids) for result in results] == [translator.by_torch(text, 25) for text in TEXTS]
    produced = np.concatenate([result.ids for result in results])
    assert translator.is_cold(produced).any(), "no cold token came out: a broken check would not be seen"
    assert len(set(produced.tolist())) > 4


# transformers' exporter would fix the length of LongT5's source.
MORE = [
    pytest.param(family, marks=[pytest.mark.optimum(only=True)] if family == "longt5" else [])
    for family in sorted(set(FAMILIES) - set(FAST))
]


@pytest.mark.slow
@pytest.mark.optimum
@pytest.mark.parametrize("family", MORE)
def test_more_families(translators, family):
    translator = translators(family)
    check_greedy(translator)
    long = TEXTS[2] * 5
    for options in ({}, {"num_beams": 4}):
        found = translator.generator.generate(long, max_new_tokens=15, **options)[0]
        assert list(found.ids) == translator.by_torch(long, 15, **options)
    assert verify(translator.path, translator.source, store=False, progress=False).ok


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
        {"temperature": 0.8, "repetition_penalty": 1.4, "frequency_penalty": 0.5, "logit_bias": {11: 3.0}},
        {"repetition_penalty": 2.0},
    ],
    ids=lambda params: "-".join(params),
)
def test_sampled_ids_equal_those_of_the_untrimmed_graphs(translator, params):
    for seed, text in enumerate(TEXTS):
        (result,) = translator.generator.generate(text, max_new_tokens=20, seed=seed, **params)
        expected = translator.full_sampler.run(translator.encode(text), 20, seed=seed, **params)
        assert list(result.ids) == expected


@pytest.mark.parametrize("family", ["t5", "marian", "m2m_100"])
@pytest.mark.parametrize("mode", ["exact", "compact"])
def test_a_batch_of_unequal_texts_gives_what_each_gives_alone(translators, family, mode):
    generator = translators(family).generator
    sampled = {"temperature": 1.0, "seed": 4}
    for params in ({}, sampled, *([sampled | {"max_block": 3}] if mode == "exact" else [])):
        together = generator.generate(TEXTS, max_new_tokens=20, mode=mode, **params)
        alone = [generator.generate(text, max_new_tokens=20, mode=mode, **params)[0] for text in TEXTS]
        assert [(r.ids, r.text, r.stopped) for r in together] == [(r.ids, r.text, r.stopped) for r in alone]


@pytest.mark.parametrize("family", ["mt5", "bart"])
def test_drafting_on_during_the_check_changes_nothing(translators, family):
    plain = translators(family).generator
    overlapping = Text2TextGenerator(plain.folder, plain._decoder, plain.codec, plain._cold, overlap=True)
    for params in ({}, {"temperature": 1.0, "seed": 2}):
        found = overlapping.generate(TEXTS, max_new_tokens=25, **params)
        assert [r.ids for r in found] == [r.ids for r in plain.generate(TEXTS, max_new_tokens=25, **params)]


def test_streamed_text_is_the_generated_text(translator):
    for text in TEXTS:
        (result,) = translator.generator.generate(text, max_new_tokens=20, temperature=1.0)
        pieces = list(translator.generator.stream(text, max_new_tokens=20, temperature=1.0))
        assert "".join(pieces) == result.text


def test_compact_mode_is_the_full_model_with_its_logits_masked(translator):
    """Allowed: the kept ids and the source's own cold ids, which hold slots."""
    for text in TEXTS:
        allowed = np.union1d(KEPT, translator.encode(text))

        def mask(_, logits, allowed=allowed):
            out = np.full_like(logits, -np.inf)
            out[allowed] = logits[allowed]
            return out

        (result,) = translator.generator.generate(text, max_new_tokens=20, mode="compact")
        expected = translator.full_sampler.run(translator.encode(text), 20, logits_processor=mask)
        assert list(result.ids) == expected
        assert result.rejected == 0


RULES = [
    {"forced_bos_token_id": 13, "forced_eos_token_id": 3},
    {"suppress_tokens": [1, 7, 28], "begin_suppress_tokens": [8, 22]},
    {"bad_words_ids": [[7], [24], [8, 8], [22, 30]], "min_length": 9},
    {"no_repeat_ngram_size": 2, "min_new_tokens": 6},
    {"forced_bos_token_id": 20, "begin_suppress_tokens": [5, 9], "no_repeat_ngram_size": 1},
]


@pytest.mark.parametrize("family", ["mt5", "bart"])
@pytest.mark.parametrize("rules", RULES, ids=lambda rules: "-".join(rules))
def test_the_generation_configs_rules_hold(translators, tmp_path, family, rules):
    """Ids that are forced or forbidden are kept ones and cold ones."""
    ruled = with_generation_config(translators(family), tmp_path, **rules)
    results = ruled.generator.generate(TEXTS, max_new_tokens=14)
    assert [list(result.ids) for result in results] == [ruled.by_torch(text, 14) for text in TEXTS]
    for seed, text in enumerate(TEXTS):
        (sampled,) = ruled.generator.generate(text, max_new_tokens=14, temperature=1.0, seed=seed)
        expected = ruled.full_sampler.run(ruled.encode(text), 14, temperature=1.0, seed=seed)
        assert list(sampled.ids) == expected
    (searched,) = ruled.generator.generate(TEXTS[0], max_new_tokens=14, num_beams=3)
    assert list(searched.ids) == ruled.by_torch(TEXTS[0], 14, num_beams=3)


SETTINGS = [
    {"num_beams": 3, "length_penalty": 0.3, "early_stopping": True, "max_length": 11},
    {"encoder_no_repeat_ngram_size": 1, "max_new_tokens": 12, "repetition_penalty": 1.7},
    {"encoder_repetition_penalty": 6.0, "max_length": 9, "forced_eos_token_id": 30},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(settings))
def test_a_call_without_options_is_generates(translators, tmp_path, settings):
    """Beams, lengths and penalties of the folder; each changes what comes without it."""
    made = with_generation_config(translators("marian"), tmp_path, **settings)
    expected = []
    for text in TEXTS:
        ids = torch.tensor(made.encode(text)[None].astype(np.int64))
        with torch.inference_mode():
            output = made.torch_model.generate(ids, attention_mask=torch.ones_like(ids))
        expected.append(output[0, 1:].tolist())
    assert [list(result.ids) for result in made.generator.generate(TEXTS)] == expected
    plain = translators("marian").generator.generate(TEXTS, max_new_tokens=len(max(expected, key=len)))
    assert [list(result.ids) for result in plain] != expected


def test_verify_knows_the_rules(translators, tmp_path):
    rules = {"forced_bos_token_id": 13, "suppress_tokens": [1, 7, 28], "bad_words_ids": [[24], [22, 30]]}
    ruled = with_generation_config(translators("mt5"), tmp_path, **rules, no_repeat_ngram_size=3)
    assert verify(ruled.path, ruled.source, store=False, progress=False).ok


def test_a_request_can_name_its_language_and_start(translators):
    translator = translators("mbart")
    for language in (8, 17):  # kept, cold
        options = {"forced_bos_token_id": language, "decoder_start_token_id": language}
        for mode in ("exact", "compact"):
            (result,) = translator.generator.generate(TEXTS[0], max_new_tokens=12, mode=mode, **options)
            assert result.ids[0] == language
            if mode == "exact":
                assert list(result.ids) == translator.by_torch(TEXTS[0], 12, **options)


def test_a_model_without_a_start_asks_for_one(translators, tmp_path):
    without = with_generation_config(
        translators("mbart"), tmp_path, decoder_start_token_id=None, bos_token_id=None
    )
    file = without.path / "config.json"
    config = {key: value for key, value in json.loads(file.read_text()).items() if "start" not in key}
    file.write_text(json.dumps(config | {"bos_token_id": None}))
    rehash(without.path)
    with pytest.raises(UsageError, match="pass decoder_start_token_id"):
        without.generator.generate("dog")
    assert without.generator.generate("dog", max_new_tokens=3, decoder_start_token_id=3)[0].ids


def test_the_encoder_runs_once_a_request(translators, monkeypatch):
    generator = translators("t5").generator
    runs = []
    encoder = generator._decoder._encoder

    class Counted:
        def __getattr__(self, name):
            return getattr(encoder, name)

        def run_with_iobinding(self, binding):
            runs.append(binding)
            encoder.run_with_iobinding(binding)

    monkeypatch.setattr(generator._decoder, "_encoder", Counted())
    (result,) = generator.generate(TEXTS[0], max_new_tokens=12)
    assert len(result.ids) > 1
    assert len(runs) == 1


def test_statistics_count_sources_and_cold_tokens(translators):
    translator = translators("t5")
    generator = load(translator.path)
    results = generator.generate(TEXTS, max_new_tokens=10)
    sources = [translator.encode(text) for text in TEXTS]
    cold = sum(int(translator.is_cold(ids).sum()) for ids in [*sources, *(r.ids for r in results)])
    assert generator.stats.prompt_tokens == sum(map(len, sources))
    assert generator.stats.tokens == sum(len(result.ids) for result in results)
    assert generator.stats.cold_tokens == cold > 0


def rounding_of_logits(translator, source, target) -> float:
    """How far another computation of the logits of a target may lie from torch's."""
    fed = {"input_ids": source, "decoder_input_ids": target}
    tensors = {name: torch.tensor(ids[None].astype(np.int64)) for name, ids in fed.items()}
    return model_bound(translator.torch_model, lambda model: model(**tensors).logits, draws=2)


@pytest.mark.parametrize("family", ["t5", "mt5", "bart", "m2m_100"])
def test_scores_are_the_full_models_log_probabilities(translators, family):
    translator = translators(family)
    targets = [*TEXTS[1:], TEXTS[0]]
    for text, source, score in zip(targets, TEXTS, translator.generator.score(targets, TEXTS), strict=True):
        read = translator.encode(source)
        table = translator.full_sampler.log_probs(read, score.ids[:-1])
        expected = table[np.arange(len(score.ids) - 1), score.ids[1:]]
        bound = rounding_of_logits(translator, read, score.ids[:-1])
        assert_within(score.log_probs, expected, 2 * bound, rows=0)
        assert score.ids[0] == FAMILIES[family][1]["decoder_start_token_id"]
        said = translator.encode(text)
        assert score.ids[-len(said) + 1 :].tolist() == said[1:].tolist()
        if family == "m2m_100":  # the forced language instead of what the tokenizer begins with
            assert score.ids[1] == 20
    with pytest.raises(UsageError, match="found 0 sources for 1 texts"):
        translator.generator.score("dog")


def test_the_cold_mass_is_reported(translators):
    translator = translators("t5")
    (result,) = translator.generator.generate("dog", max_new_tokens=6, mode="compact", report_mass=True)
    source = translator.encode("dog")
    fed = np.array([0, *result.ids[:-1]], np.int32)
    probabilities = np.exp(translator.full_sampler.log_probs(source, fed))
    reach = np.union1d(KEPT, source)
    expected = 1 - probabilities[:, reach].sum(axis=1)
    # Logits that are each off by b move a share p of a softmax by no more than exp(2 b) p.
    bound = np.expm1(2 * rounding_of_logits(translator, source, fed))
    assert_within(result.cold_mass, expected.mean(), bound, rows=None)
    shifted = 1 - probabilities[:, (reach + 1) % V].sum(axis=1)
    assert abs(shifted.mean() - expected.mean()) > bound  # it sees the neighbours of these ids


def test_a_bias_of_the_logits_counts_for_cold_ids(translators, tmp_path):
    """Without the cold part of final_logits_bias other ids come out: the tests above would see it."""
    translator = translators("bart")
    assert read_header(translator.path / COLD_NAME)[0]["head_bias"].shape == (26,)
    broken = tmp_path / "broken"
    shutil.copytree(translator.path, broken)
    spec = read_header(broken / COLD_NAME)[0]["head_bias"]
    with (broken / COLD_NAME).open("r+b") as file:
        file.seek(spec.offset)
        file.write(bytes(spec.nbytes))
    rehash(broken)
    options = {"max_new_tokens": 20, "temperature": 1.0}
    good = [result.ids for result in translator.generator.generate(TEXTS, **options)]
    assert good != [result.ids for result in load(broken).generate(TEXTS, **options)]


def test_one_wrong_cold_row_is_noticed(translators, tmp_path):
    translator = translators("t5")
    broken = tmp_path / "broken"
    shutil.copytree(translator.path, broken)
    spec = read_header(broken / COLD_NAME)[0]["embedding"]
    (result,) = translator.generator.generate(TEXTS[0], max_new_tokens=20)
    row = np.searchsorted(
        translator.generator.folder.vocab.cold_ids,
        next(token for token in result.ids if translator.is_cold([token])[0]),
    )
    with (broken / COLD_NAME).open("r+b") as file:
        file.seek(spec.offset + int(row) * HIDDEN * 4)
        file.write(bytes(HIDDEN * 4))
    rehash(broken)
    assert load(broken).generate(TEXTS[0], max_new_tokens=20)[0].ids != result.ids
    checked = verify(broken, translator.source, store=False, progress=False)
    assert {"kept-rows", "cold-slots"} <= set(checked.failed)


@pytest.mark.parametrize("family", ["t5", "mt5", "marian", "m2m_100"])
def test_what_export_makes_is_verified(translators, family):
    translator = translators(family)
    result = verify(translator.path, translator.source, store=False, progress=False)
    assert result.ok, result.failed
    names = [check.name for check in result.checks]
    assert names[-5:] == ["hidden-states", "kept-logits", "cold-slots", "generated-ids", "source"]


def test_each_vocab_matrix_is_stored_once_for_both_graphs(translator):
    tables = {}
    for name in ("encoder_model.onnx", "decoder_model.onnx"):
        graph = ir.load(translator.path / name).graph
        assert not any(node.op_type == "If" for node in graph)
        tensors = [value.const_value for value in graph.initializers.values()]
        large = [tensor for tensor in tensors if tensor.nbytes > 256]
        assert {tensor.location for tensor in large} == {"model.onnx_data"}
        shapes = {(len(KEPT), HIDDEN), (HIDDEN, len(KEPT))}
        tables[name] = {tensor.offset for tensor in large if tuple(tensor.shape.numpy()) in shapes}
    (embedding,) = tables["encoder_model.onnx"]
    heads = tables["decoder_model.onnx"] - {embedding}
    untied = "head" in read_header(translator.path / COLD_NAME)[0]
    assert embedding in tables["decoder_model.onnx"]
    assert len(heads) == untied


def test_the_encoder_makes_the_cross_attention_of_any_length(translators):
    translator = translators("marian")
    encoder = ort.InferenceSession(str(translator.full / "encoder_model.onnx"))
    names = [value.name for value in encoder.get_outputs()]
    assert [name for name in names if "present" in name] == [
        f"present.{layer}.encoder.{part}" for layer in range(2) for part in ("key", "value")
    ]
    ids = np.random.default_rng(0).integers(0, 36, (3, 11))
    feeds = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "cold_rows": np.zeros((1, HIDDEN), np.float32),
    }
    made_by_graph = dict(zip(names, encoder.run(names, feeds), strict=True))

    @torch.no_grad()
    def by_torch(model) -> np.ndarray:
        """Keys and values of both layers, stacked."""
        start = torch.full((3, 1), 36)
        made = model(input_ids=torch.tensor(ids), decoder_input_ids=start, use_cache=True).past_key_values
        return torch.stack([part for *_, keys, values in made for part in (keys, values)]).numpy()

    model = translator.torch_model
    found = np.stack([made_by_graph[name] for name in names if "present" in name])
    assert_within(found, by_torch(model), model_bound(model, by_torch), rows=-2)


def test_without_cold_rows_texts_are_split_and_exact_mode_is_refused(tmp_path):
    kept = [*range(24), *range(26, 37)]
    translator = make_translator(tmp_path, "t5", kept=kept, cold=False)
    assert translator.generator.generate("the cat", max_new_tokens=4)[0].ids
    with pytest.raises(UsageError, match="without --no-cold"):
        translator.generator.generate("the cat", mode="exact")
    with pytest.raises(UsageError, match="without --no-cold"):
        translator.generator.score("the cat", "dog")


def test_every_id_kept_needs_no_cold_head(tmp_path):
    translator = make_translator(tmp_path, "bart", kept=range(37))
    for options in ({}, {"num_beams": 3}):
        (result,) = translator.generator.generate(TEXTS[0], max_new_tokens=12, **options)
        assert list(result.ids) == translator.by_torch(TEXTS[0], 12, **options)


def test_what_cannot_be_read_is_refused(translators):
    generator = translators("mbart").generator
    with pytest.raises(UsageError, match="text 2 has 82 tokens, this model's encoder reads 64 at most"):
        generator.generate(["dog", "cat " * 80])
    # The table of positions ends at 64, and so does the output.
    (result,) = generator.generate("dog", max_new_tokens=100, logits_processor=_never_end)
    assert (len(result.ids), result.stopped) == (64, "length")
    with pytest.raises(UsageError, match="no chat template"):
        generator.chat([{"role": "user", "content": "dog"}])


def _never_end(_, logits):
    out = logits.copy()
    out[3] = -np.inf
    return out


@pytest.mark.optimum(only=True)
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.UMT5Config(), "optimum-onnx 0.1.0 has no export of 'umt5' models"),
        (transformers.LEDConfig(), "optimum-onnx 0.1.0 has no export of 'led' models"),
        (transformers.ProphetNetConfig(), "optimum-onnx 0.1.0 has no export of 'prophetnet' models"),
        (transformers.NllbMoeConfig(), "optimum-onnx 0.1.0 has no export of 'nllb-moe' models"),
        (transformers.SwitchTransformersConfig(), "has no export of 'switch_transformers' models"),
        (transformers.BigBirdPegasusConfig(), "reads long texts with block-sparse attention"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_models_that_cannot_be_exported_are_refused(config, message):
    with pytest.raises(UnsupportedModelError, match=message):
        load_exporter("optimum").check_model(config, TASK)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("t5", {"dtype": "bf16"}, "no number of heads or no size of them: export the model as fp32 or fp16"),
        ("bart", {"dtype": "bf16"}, "cannot export this 'bart' model for text2text-generation-with-past"),
    ],
)
def test_ways_that_are_not_built_are_refused(translators, tmp_path, family, options, message):
    with pytest.raises(UnsupportedModelError, match=message):
        export(translators(family).source, make_vocab(KEPT, V), tmp_path / "out", progress=False, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["t5", "marian", "m2m_100"])
def test_the_trimmed_checkpoint_is_a_model_of_its_own(translators, tmp_path, family):
    """Its ids, also those in its configs, are compact ids."""
    translator = translators(family)
    export(translator.source, make_vocab(KEPT, V), tmp_path / "out", to="safetensors", progress=False)
    trimmed = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    start = translator.torch_model.config.decoder_start_token_id
    assert trimmed.generation_config.decoder_start_token_id == KEPT.index(start)
    compact = torch.tensor(np.random.default_rng(0).integers(0, len(KEPT), (2, 7)))
    ids = torch.tensor(KEPT)[compact]

    def by_torch(model) -> torch.Tensor:
        return model(input_ids=ids, decoder_input_ids=ids).logits[..., KEPT]

    model = translator.torch_model
    found = trimmed(input_ids=compact, decoder_input_ids=compact).logits
    assert_within(found, by_torch(model), model_bound(model, by_torch), rows=-1)


def test_half_precision(translators, tmp_path):
    translator = translators("mt5")
    export(translator.source, make_vocab(KEPT, V), tmp_path / "half", dtype="fp16", progress=False)
    half = load(tmp_path / "half").generate(TEXTS, max_new_tokens=2)
    assert [r.ids for r in half] == [r.ids for r in translator.generator.generate(TEXTS, max_new_tokens=2)]


def test_the_command_line_translates(translators, capsys):
    translator = translators("m2m_100")
    words = ["run", str(translator.path), TEXTS[0], "--max-new-tokens", "8"]
    (plain,) = translator.generator.generate(TEXTS[0], max_new_tokens=8)
    assert main(words) == 0
    assert capsys.readouterr().out == plain.text + "\n"
    assert main([*words, "--format", "json"]) == 0
    # As transformers' pipeline for such models: the source is no part of what was generated.
    assert json.loads(capsys.readouterr().out)["generated_text"] == [plain.text]
    assert main([*words, "--num-beams", "3", "--length-penalty", "0.5", "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    (searched,) = translator.generator.generate(TEXTS[0], max_new_tokens=8, num_beams=3, length_penalty=0.5)
    assert document["ids"] == [list(searched.ids)]
    assert (document["mode"], document["drafted"]) == ("exact", 0)
    assert main([*words, "--num-beams", "3", "--length-penalty", "0.5"]) == 0
    assert capsys.readouterr().out == searched.text + "\n"
    assert main([*words, "--forced-bos", "cat", "--format", "json"]) == 0
    forced = json.loads(capsys.readouterr().out)
    assert forced["ids"][0][0] == translator.generator.codec.tokenizer.token_to_id("cat")
    assert main([*words, "--forced-bos", "no such token"]) == 2
    assert "has no token 'no such token'" in capsys.readouterr().err


def test_two_vocabs_are_refused(tmp_path, monkeypatch):
    name, config = FAMILIES["marian"]
    apart = config | {"share_encoder_decoder_embeddings": False, "tie_word_embeddings": False}
    monkeypatch.setitem(families.FAMILIES, "apart", (name, apart))
    path = save_translator("apart", tmp_path / "model")
    with pytest.raises(UnsupportedModelError, match="vocabs of their own"):
        export(path, make_vocab(KEPT, V), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_model_for_both_is_not_taken_for_a_part_of_it():
    for name in ("T5ForConditionalGeneration", "MarianMTModel"):
        config = transformers.PretrainedConfig(architectures=[name], is_encoder_decoder=True)
        assert infer_task(config) == TASK
    for name in ("T5EncoderModel", "BartModel"):
        config = transformers.PretrainedConfig(architectures=[name], is_encoder_decoder=True)
        with pytest.raises(UnsupportedModelError, match="part of an encoder-decoder"):
            infer_task(config)
