"""Generation settings of a folder and of a call against `generate()` of transformers, in exact mode.

Each setting is tried on a tiny model for which it matters: the ids without it must be others.
"""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.support.folders import make_vocab  # noqa: E402
from tests.support.generators import Pair, open_generator  # noqa: E402
from tests.support.models import save_model  # noqa: E402
from trimserve.decoding.sampling import SamplingParams, filter_scores  # noqa: E402
from trimserve.errors import UnsupportedModelError, UsageError  # noqa: E402
from trimserve.folder.manifest import read_manifest, write_manifest  # noqa: E402
from trimserve.folder.opening import list_files  # noqa: E402
from trimserve.generation.fields import FIELDS, check_settings  # noqa: E402
from trimserve.model.resolve import resolve_model  # noqa: E402
from trimserve.model.structural import structural_ids  # noqa: E402
from trimserve.text.stop_matcher import StopMatcher  # noqa: E402
from trimserve_export.checkpoint.generation_settings import known_fields, read_generation  # noqa: E402
from trimserve_export.pipeline import export  # noqa: E402

pytestmark = pytest.mark.export

PROMPTS = ("the cat sat on the mat", "a dog and a cat. the dog")
TOKENS = 24
FILE = "generation_config.json"
GIVEN = {"eos_token_id", "encoder_repetition_penalty"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory, one_thread):  # noqa: ARG001
    root = tmp_path_factory.mktemp("settings")
    source = resolve_model(save_model("llama", root / "model", tokenizer="byte_level_bpe", seed=4))
    structural = structural_ids(source)
    others = np.setdiff1d(np.arange(source.vocab_size), structural)[::2]
    kept = np.union1d(structural, others)[: 128 + structural.size].tolist()
    vocab = make_vocab(kept, source.vocab_size, source.tokenizer_sha256)
    export(source, vocab, root / "trimmed", progress=False)
    return Pair(open_generator(root / "trimmed"), source.path, root)


@pytest.fixture(scope="module")
def bare(pair, tmp_path_factory):
    """The same model without any settings."""
    return open_generator(with_settings(pair, tmp_path_factory.mktemp("bare"), {}))


@pytest.fixture(scope="module")
def full(pair):
    return pair.torch_model()


@pytest.fixture(scope="module")
def prompts(pair):
    return pair.generator.codec.encode(PROMPTS)


@pytest.fixture(scope="module")
def plain(pair, full, prompts):
    """What the folder without any settings gives."""
    ids = [by_torch(pair, full, prompt) for prompt in prompts]
    assert any(not pair.generator.folder.vocab.is_kept(np.array(found)).all() for found in ids)
    return ids


def by_torch(pair, full, prompt, **settings):
    full.generation_config = transformers.GenerationConfig(pad_token_id=0)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=pair.generator.codec.tokenizer)
    ids = torch.tensor(prompt[None].astype(np.int64))
    extra = {"tokenizer": tokenizer} if settings.get("stop_strings") else {}
    length = {} if "max_length" in settings else {"max_new_tokens": TOKENS}
    with torch.inference_mode():
        made = full.generate(ids, attention_mask=torch.ones_like(ids), **{**length, **settings}, **extra)
    return made[0, len(prompt) :].tolist()


def with_settings(pair, root, settings):
    """A copy of the trimmed folder that has a generation config."""
    folder = root / "trimmed"
    shutil.copytree(pair.generator.folder.path, folder)
    (folder / FILE).write_text(json.dumps(settings))
    write_manifest(folder, replace(read_manifest(folder), files=list_files(folder)))
    return folder


def settings_for(plain):
    """A value for each setting that changes what the plain folder gives."""
    first, second = plain[0], plain[1]
    return {
        "repetition_penalty": 1.5,
        "encoder_repetition_penalty": 8.0,
        "no_repeat_ngram_size": 2,
        "eos_token_id": [first[5], second[7]],
        "suppress_tokens": [first[3], second[3]],
        "begin_suppress_tokens": [first[0], second[0]],
        "bad_words_ids": [[first[2]], [first[0], first[1]]],
        "sequence_bias": [[[first[4]], -9.0], [[second[0], second[1]], -20.0]],
        "forced_eos_token_id": first[2] + 1,
        "stop_strings": None,  # see below
        "max_length": 12,
    }


def test_each_setting_of_the_folder_and_of_the_call_is_generates(pair, bare, full, prompts, plain, tmp_path):
    known = settings_for(plain)
    tokenizer = pair.generator.codec.tokenizer
    texts = [tokenizer.decode([token]) for token in plain[0]]
    known["stop_strings"] = [next(text for text in texts[2:] if text.isascii() and text.strip()), "\r"]
    ends = {"eos_token_id": [plain[0][5], plain[1][3]]}
    cases = [{name: value} for name, value in known.items()]
    cases += [
        {"encoder_repetition_penalty": 8.0, "encoder_no_repeat_ngram_size": 1},
        ends | {"min_new_tokens": 9},
        ends | {"min_length": 30},
        ends | {"exponential_decay_length_penalty": [3, 1.6]},
    ]
    cases.append({"num_beams": 3} | ends)
    cases.append({"num_beams": 2, "repetition_penalty": 1.4})
    for number, case in enumerate(cases):
        expected = [by_torch(pair, full, prompt, **case) for prompt in prompts]
        # Each of them matters; what has a case of its own only makes another matter here.
        for name in case.keys() - (GIVEN if len(case) > 1 else set()):
            fewer = {key: value for key, value in case.items() if key != name}
            assert expected != [by_torch(pair, full, prompt, **fewer) for prompt in prompts], (name, case)
        length = {} if "max_length" in case else {"max_new_tokens": TOKENS}
        folder = with_settings(pair, tmp_path / str(number), case | length)
        by_folder = [list(made.ids) for made in open_generator(folder).generate(PROMPTS)]
        assert by_folder == expected, case
        arguments = case | length
        by_call = [list(made.ids) for made in bare.generate(PROMPTS, **arguments)]
        assert by_call == expected, case
        # A folder's settings can be switched off by the call.
        off = {name: () for name in case if name not in ("max_length", "num_beams")}
        off |= {name: 1.0 for name in off if name.endswith("penalty") and "decay" not in name}
        off |= {name: 0 for name in off if name.endswith("size") or name.startswith("min")}
        off |= {"num_beams": 1, "early_stopping": False, "renormalize_logits": False}
        unset = open_generator(folder).generate(PROMPTS, **off, max_new_tokens=TOKENS)
        assert [list(made.ids) for made in unset] == plain, case


def test_stream_and_chat_start_from_the_folder_too(pair, full, tmp_path):
    folder = with_settings(pair, tmp_path, {"repetition_penalty": 1.5, "max_new_tokens": 10})
    config = (
        json.loads((folder / "tokenizer_config.json").read_text())
        if (folder / "tokenizer_config.json").is_file()
        else {}
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"})
    )
    write_manifest(folder, replace(read_manifest(folder), files=list_files(folder)))
    model = open_generator(folder)
    expected = by_torch(
        pair, full, model.codec.encode([PROMPTS[0]])[0], repetition_penalty=1.5, max_new_tokens=10
    )
    assert list(model.chat([{"role": "user", "content": PROMPTS[0]}]).ids) == expected
    assert "".join(model.stream(PROMPTS[0])) == model.codec.decode(expected)


def test_lengths_are_generates(pair, bare, full, prompts, tmp_path):
    """Which of the four lengths counts, on both sides."""
    (prompt,) = prompts[:1]
    size = len(prompt)
    model = open_generator(with_settings(pair, tmp_path, {"max_length": size + 7}))
    (made,) = model.generate(PROMPTS[0])
    assert list(made.ids) == by_torch(pair, full, prompt, max_length=size + 7)
    assert len(model.generate(PROMPTS[0], max_new_tokens=9)[0].ids) == 9
    assert len(model.generate(PROMPTS[0], max_length=size + 2)[0].ids) == 2
    with pytest.raises(UsageError, match=f"max_length is {size}"):
        model.generate(PROMPTS[0], max_length=size)
    # 128, or what the model's 64 positions leave.
    assert len(bare.generate(PROMPTS[0], max_length=None)[0].ids) == 64 + 1 - size
    old = open_generator(with_settings(pair, tmp_path / "old", {"max_length": 20}))
    installed = int(transformers.__version__[0])
    assert len(old.generate(PROMPTS[0])[0].ids) == (20 if installed < 5 else 20 - size)


def test_temperature_and_do_sample_say_what_is_sampled(pair, tmp_path):
    model = open_generator(
        with_settings(pair, tmp_path, {"do_sample": True, "temperature": 0.6, "top_p": 0.9})
    )
    params = model.plan({}).params
    assert (params.temperature, params.top_p, params.top_k) == (0.6, 0.9, 50)
    assert model.plan({"top_k": 7, "temperature": 2.0}).params.top_k == 7
    for options in ({"temperature": 0}, {"do_sample": False}):
        greedy = model.plan(options).params
        assert greedy.takes_maximum
    same = {"temperature": 0.6, "top_p": 0.9, "top_k": 50, "seed": 0}
    (by_folder,), (by_call,) = (model.generate("the cat", max_new_tokens=9, **given) for given in ({}, same))
    assert by_folder.ids == by_call.ids
    assert pair.generator.plan({"temperature": 0.5}).params.top_k == 0
    assert pair.generator.plan({"do_sample": True}).params.temperature == 1.0
    with pytest.raises(UsageError, match="top_p"):
        pair.generator.generate("the cat", top_p=0.5)
    with pytest.raises(UsageError, match="guidance_scale"):
        pair.generator.generate("the cat", guidance_scale=2.0)


FILTERS = {
    "top_k": 5,
    "top_p": 0.7,
    "min_p": 0.2,
    "typical_p": 0.6,
    "epsilon_cutoff": 0.03,
    "eta_cutoff": 0.2,
    "top_h": 0.4,
}


@pytest.mark.parametrize("name", FILTERS)
def test_filters_leave_the_ids_that_transformers_leaves(name):
    if name not in known_fields():
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    rng = np.random.default_rng(3)
    for keep, beams in ((1, 1), (2, 2)):
        config = transformers.GenerationConfig(do_sample=True, num_beams=beams)
        config.update(**{"top_k": 0, "top_p": 1.0, "temperature": 1.7, name: FILTERS[name]})
        config.update(**{n: v for n, v in _library_defaults().items() if getattr(config, n) is None})
        config._eos_token_tensor = torch.tensor([1])
        processors = transformers.GenerationMixin()._get_logits_processor(config, 3, device="cpu")
        for _ in range(50):
            logits = rng.normal(scale=2, size=60).astype(np.float32)
            theirs = processors(torch.zeros(1, 3, dtype=torch.int64), torch.tensor(logits[None]))[0].numpy()
            params = SamplingParams(temperature=1.7, **{name: FILTERS[name]})
            ours = filter_scores(logits / np.float32(1.7), params, keep)
            assert (np.isfinite(theirs) == np.isfinite(ours)).all()
            assert 0 < np.isfinite(ours).sum() < 60  # it matters


def _library_defaults():
    defaults = getattr(transformers.GenerationConfig, "_get_default_generation_params", dict)()
    return {name: value for name, value in defaults.items() if value is not None}


def test_beam_sampling_is_distributed_as_generates(pair, bare, full, prompts):
    """First tokens of two sampled beams, against many draws of transformers'."""
    options = {"do_sample": True, "num_beams": 2, "top_k": 4, "temperature": 3.0}
    draws = 120
    torch.manual_seed(0)
    theirs = [by_torch(pair, full, prompts[0], max_new_tokens=2, **options)[0] for _ in range(draws)]
    ours = [
        bare.generate(PROMPTS[0], max_new_tokens=2, seed=seed, **options)[0].ids[0] for seed in range(draws)
    ]
    shares = np.array(
        [[run.count(token) / draws for token in sorted({*theirs, *ours})] for run in (ours, theirs)]
    )
    assert len(shares[0]) > 1
    assert np.abs(shares[0] - shares[1]).max() < 4 * np.sqrt(0.25 * 2 / draws)


def test_stop_strings_end_where_generates_do(pair, full, prompts, plain, tmp_path):
    """Special tokens, strings over several tokens, with the prompt's end, and inside a token."""
    tokenizer = pair.generator.codec.tokenizer
    text = tokenizer.decode(plain[0])
    end_of_prompt = PROMPTS[0][-3:] + tokenizer.decode(plain[0][:1])
    special = tokenizer.token_to_id("<|end|>")
    bias = {"sequence_bias": [[[plain[0][3], special], 1e3]]}
    cases = [{"stop_strings": text[n : n + 3]} for n in range(0, len(text) - 3, 5) if "\ufffd" not in text]
    cases += [{"stop_strings": end_of_prompt}, bias | {"stop_strings": ["<|end|>"]}]
    stopped = 0
    for number, case in enumerate(cases):
        case = case | {
            "stop_strings": [case["stop_strings"]]
            if isinstance(case["stop_strings"], str)
            else case["stop_strings"]
        }
        expected = by_torch(pair, full, prompts[0], **case)
        stopped += len(expected) < TOKENS
        model = open_generator(with_settings(pair, tmp_path / str(number), case | {"max_new_tokens": TOKENS}))
        for max_block in (1, 7):
            (made,) = model.generate(PROMPTS[0], max_block=max_block)
            assert list(made.ids) == expected, case
            assert (made.stopped == "stop") == (len(expected) < TOKENS)
    assert stopped >= 2


def test_stop_matcher_sees_characters_in_several_tokens(pair):
    tokenizer = pair.generator.codec.tokenizer
    ids = tokenizer.encode("ab ß€", add_special_tokens=False).ids
    matcher = StopMatcher(tokenizer, ["ß€"], ids[:1])
    assert [matcher.ends_with(token) for token in ids[1:]] == [False] * (len(ids) - 2) + [True]


def test_every_field_of_the_installed_generation_config_is_in_the_table():
    assert known_fields().keys() - FIELDS.keys() == set()


def test_what_cannot_be_honoured_is_refused_by_name_at_export_and_at_load(pair, tmp_path):
    refused = {name for name, field in FIELDS.items() if field.role == "refused"}
    for name in sorted(refused):
        with pytest.raises(UnsupportedModelError, match=name):
            check_settings({name: 3}, "here")
        for value in (None, *FIELDS[name].off):
            check_settings({name: value}, "here")
    with pytest.raises(UnsupportedModelError, match=r"guidance_scale = 1\.5"):
        open_generator(with_settings(pair, tmp_path, {"guidance_scale": 1.5}))
    shutil.copytree(pair.model_path, tmp_path / "model")
    (tmp_path / "model" / FILE).write_text(json.dumps({"guidance_scale": 1.5}))
    with pytest.raises(UnsupportedModelError, match=r"guidance_scale = 1\.5"):
        export(
            resolve_model(str(tmp_path / "model")),
            pair.generator.folder.vocab,
            tmp_path / "out",
            progress=False,
        )
    assert not (tmp_path / "out").exists()


def test_config_json_speaks_where_there_is_no_generation_config(pair, tmp_path):
    """As the installed transformers reads it; with a generation_config.json it has no say."""
    legacy = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "max_new_tokens": 9, "eos_token_id": 5}
    for number, own in enumerate((None, {"repetition_penalty": 1.2})):
        folder = tmp_path / f"model{number}"
        shutil.copytree(pair.model_path, folder)
        config = json.loads((folder / "config.json").read_text()) | legacy
        (folder / "config.json").write_text(json.dumps(config))
        (folder / FILE).unlink(missing_ok=True)
        if own is not None:
            (folder / FILE).write_text(json.dumps(own))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).generation_config
        found = read_generation(resolve_model(str(folder)))
        assert found["transformers_version"] == transformers.__version__
        settings = found if own is None else own
        for name in (*legacy, "no_repeat_ngram_size", "bos_token_id"):
            default = known_fields()[name]
            assert settings.get(name, default) == getattr(theirs, name), name


def test_the_runtime_takes_the_settings_of_the_manifest_without_a_file(pair, bare, tmp_path):
    shutil.copytree(pair.generator.folder.path, tmp_path / "trimmed")
    (tmp_path / "trimmed" / FILE).unlink()
    manifest = read_manifest(tmp_path / "trimmed")
    generation = {"transformers_version": "5.0.0", "repetition_penalty": 1.5, "max_new_tokens": 9}
    made = replace(manifest, files=list_files(tmp_path / "trimmed"), generation=generation)
    write_manifest(tmp_path / "trimmed", made)
    model = open_generator(tmp_path / "trimmed")
    expected = bare.generate(PROMPTS, repetition_penalty=1.5, max_new_tokens=9)
    assert [made.ids for made in model.generate(PROMPTS)] == [made.ids for made in expected]
    assert model.config.library == 5
