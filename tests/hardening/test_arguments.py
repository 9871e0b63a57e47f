"""Arguments of public functions: any value for any option gives a result or a sentence, never anything else.

The fuzz counts: it prints how many calls were tried, how many were refused, and its seed.
"""

import dataclasses
import json
import random
import shutil
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import trimserve  # noqa: E402
from tests.encoder.test_encoder import make_pair as make_encoder  # noqa: E402
from tests.support.counting import Counter  # noqa: E402
from tests.support.folders import make_vocab  # noqa: E402
from tests.support.generators import make_pair  # noqa: E402
from tests.support.profiles import make_profile  # noqa: E402
from trimserve.arguments import kind_of  # noqa: E402
from trimserve.decoding.logit_edits import LogitEdits  # noqa: E402
from trimserve.errors import MismatchError, NoTokenError, TrimserveError, UsageError  # noqa: E402
from trimserve.folder.manifest import read_manifest, write_manifest  # noqa: E402
from trimserve.folder.opening import list_files  # noqa: E402
from trimserve.generation.options import GenerationOptions  # noqa: E402

pytestmark = [pytest.mark.export]

SEED = 20261130
CALLS = 2000
SLOW_CALLS = 4_000
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
NAMES = sorted(GenerationOptions.__annotations__)
# Calls that would take long are not what is tried here.
HARMLESS = {"max_new_tokens": 3}

# Values of all kinds: right for some option, at its borders, and right for none.
WILD: list[Any] = [
    *(None, True, False, 0, 1, 2, 3, -1, 5, 128, 2**31, 2**40, 2**63, 2**64, 2**64 - 1, -(2**63), 10**400),
    *(
        0.0,
        0.5,
        1.0,
        1.1,
        -0.5,
        1e-30,
        1e-6,
        1e-7,
        1e300,
        float("nan"),
        float("inf"),
        float("-inf"),
        1.5,
        1e9,
    ),
    *(
        "",
        "a",
        "###",
        "5",
        "0.7",
        "exact",
        "compact",
        "never",
        "\ud800",
        "\0",
        "x" * 3000,
        "ü🎉",
        "auto",
        "none",
    ),
    *(
        b"",
        b"bytes",
        bytearray(b"x"),
        [],
        [1],
        ["a"],
        [""],
        [[]],
        [[1]],
        [[1, 2]],
        [1, "a"],
        [None],
        [["a", "b"]],
    ),
    *([-1], [2**40], [True], [0.5], ["\ud800"], [b"x"], [[[1]]], [[2], [3, 4]], ((1,), 0.5), [[[1], 0.5]]),
    *([[[1], float("nan")]], [[[], 1.0]], [(5, 1e300)], (2, 1.5), (2, 1e6), (0, 1e-6), [5, 1.1], (-1, 2.0)),
    *(
        (),
        (1, 2),
        ("a", "b"),
        [("a", "b")],
        [("a",)],
        {},
        {1: 2.0},
        {1: 2},
        {-1: 1.0},
        {2**40: 1.0},
        {"5": 1.0},
    ),
    *({5: float("nan")}, {5: float("inf")}, {np.int64(3): np.float32(4)}, {(1, 2): 0.5}, {(): 1.0}, {5: "x"}),
    *(
        {5: 1e9},
        {5: -1e9},
        {"a": 0.5},
        {1, 2},
        frozenset({"a"}),
        range(3),
        object(),
        lambda *_: None,
    ),
    *(
        np.int64(3),
        np.int32(0),
        np.float32(0.5),
        np.float64("nan"),
        np.bool_(True),
        np.array(3),
        np.array([1, 2]),
    ),
    *(
        np.array(["a", "b"]),
        np.zeros((2, 2)),
        np.array([], np.int32),
        np.str_("a"),
        Decimal("0.5"),
        Fraction(1, 2),
    ),
    *(1j, Path("x"), Path(), iter(["a"]), Exception("x"), NotImplemented, ..., type, int, slice(1)),
]


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    pair = make_pair(tmp_path_factory.mktemp("generator"), "llama", kept=160, tokenizer="byte_level_bpe")
    return with_template(pair.generator.folder.path, tmp_path_factory.mktemp("with_template"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return make_encoder(tmp_path_factory.mktemp("encoder"), "bert_encoder").encoder


def with_template(path, root, **settings):
    """A copy of a folder with a chat template, and with other generation settings."""
    copy = root / "folder"
    shutil.copytree(path, copy)
    (copy / "chat_template.jinja").write_text(CHAT)
    if settings:
        (copy / "generation_config.json").write_text(json.dumps(settings))
    manifest = read_manifest(copy)
    generation = {**(manifest.generation or {}), **settings} if settings else manifest.generation
    write_manifest(copy, dataclasses.replace(manifest, files=list_files(copy), generation=generation))
    return trimserve.load(copy)


def run(call, *args, **kwargs):
    """A result, drawn to its end, or the error of ours."""
    try:
        result = call(*args, **kwargs)
        return list(result) if hasattr(result, "__next__") else result
    except TrimserveError as error:
        found = error
    except OSError as error:
        if error.errno is None:  # else it is what the system says of a path
            raise
        return error
    assert "\n" not in str(found)
    assert str(found).endswith((".", "?")), found
    return found


def tries(calls: int, seed: int, targets: dict[str, tuple[Any, tuple[Any, ...], list[str], dict[str, Any]]]):
    """Call the targets with wild values; each must give a result or a sentence."""
    rng = random.Random(seed)
    counter = Counter("calls with wild arguments", seed)
    for number in range(calls):
        name = rng.choice(sorted(targets))
        call, args, options, harmless = targets[name]
        args = tuple(rng.choice(WILD) if rng.random() < 0.1 else value for value in args)
        picked = rng.sample(options, min(len(options), rng.choice((0, 1, 1, 1, 2, 3))))
        given = {option: rng.choice(WILD) for option in picked}
        if rng.random() < 0.05:
            given[rng.choice(("max_tokens", "colunm", "topk", "x"))] = 1
        try:
            found = run(call, *args, **{**harmless, **given})
        except Exception as error:
            error.add_note(f"call {number} of seed {seed}: {name}{args} with {given}")
            raise
        counter.add("refused" if isinstance(found, TrimserveError) else "answered")
    counter.check()
    return counter.kinds["refused"]


def generator_targets(model):
    limited = {**HARMLESS}
    names = [name for name in NAMES if name not in ("max_new_tokens", "max_length")]
    return {
        "generate": (model.generate, ("the cat",), names, limited),
        "generate_length": (
            model.generate,
            ("the cat",),
            ["max_new_tokens"],
            {"min_new_tokens": 0, "stop": "t"},
        ),
        "generate_many": (model.generate, (["the cat", "a dog"],), names, limited),
        "generate_sampled": (model.generate, ("the cat",), names, {**limited, "temperature": 0.7}),
        "generate_compact": (model.generate, ("the cat",), names, {**limited, "mode": "compact"}),
        "generate_beams": (model.generate, ("the cat",), names, {**limited, "num_beams": 2}),
        "stream": (model.stream, ("the cat",), names, limited),
        "chat": (model.chat, ([{"role": "user", "content": "x"}],), names, limited),
        "stream_chat": (model.stream_chat, ([{"role": "user", "content": "x"}],), names, limited),
        "score": (model.score, ("the cat",), [], {}),
        "chat_ids": (model.chat_ids, ([{"role": "user", "content": "x"}],), [], {}),
    }


def encoder_targets(model):
    batch = ["batch_size"]
    prompts = ["prompt_name", "prompt", "batch_size"]
    return {
        "encode": (model.encode, (["the cat"],), [*prompts, "truncate_dim", "normalize"], {}),
        "encode_query": (model.encode_query, (["the cat"],), batch, {}),
        "encode_document": (model.encode_document, (["the cat"],), batch, {}),
        "encode_sparse": (model.encode_sparse, (["the cat"],), prompts, {}),
        "similarity": (model.similarity, (np.eye(2), np.eye(2)), [], {}),
        "similarity_pairwise": (model.similarity_pairwise, (np.eye(2), np.eye(2)), [], {}),
        "predict": (model.predict, ([("a", "b")],), [*prompts, "apply_softmax"], {}),
        "rank": (model.rank, ("a", ["b"]), [*prompts, "top_k", "return_documents"], {}),
        "forward": (model.forward, (["the cat"],), batch, {}),
        "token_ids": (model.token_ids, (["the cat"],), [], {}),
        "classify": (model.classify, (["the cat"],), ["top_k", "function", "batch_size"], {}),
        "tag": (model.tag, (["the cat"],), ["aggregation", "ignore_labels", "batch_size"], {}),
        "answer": (model.answer, ("who", "the cat"), ["top_k", "doc_stride", "max_seq_len"], {}),
        "fill_mask": (model.fill_mask, (["the cat"],), ["top_k", "targets", "batch_size"], {}),
    }


def other_targets(generator, tmp_path):
    profile = make_profile([5, 4, 3, 0, 1] * 40)
    vocab = make_vocab([0, 1, 2], 5)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("the cat sat\n")
    model = str(generator.folder.path)
    selecting = [
        *("coverage", "top_k", "min_count", "max_bytes", "min_docs", "output_coverage", "separate_output"),
        *("floors", "keep_tokens", "keep_ids", "keep_file", "multiple_of", "model"),
    ]
    counting = [
        "texts",
        "text_column",
        "output_column",
        "chat",
        "unit",
        "skip_bad",
        "engine",
        "shard",
        "resume",
    ]
    exporting = [
        *(
            "task",
            "exporter",
            "dtype",
            "layout",
            "to",
            "cold",
            "quantize",
            "vocab_bits",
            "calibration",
            "device",
            "link",
            "variant",
            "sketch",
        ),
        *("overwrite", "trust_remote_code", "revision", "adapter", "profile", "progress"),
    ]
    return {
        "select": (trimserve.select, (profile,), selecting, {}),
        "merge": (trimserve.merge, ([profile],), ["weights"], {}),
        "diff": (trimserve.diff, (profile, profile), ["top"], {}),
        "profile": (trimserve.profile, ([str(corpus)], model), counting, {"progress": False, "workers": 1}),
        "export": (
            trimserve.export,
            (str(tmp_path), vocab, tmp_path / "out"),
            exporting,
            {"progress": False},
        ),
        "verify": (trimserve.verify, (tmp_path, tmp_path), ["revision", "adapter", "store", "texts"], {}),
        "inspect": (trimserve.inspect, (tmp_path,), ["kept", "revision"], {}),
        "load": (trimserve.load, (tmp_path,), ["device", "threads", "memory"], {}),
    }


def all_targets(generator, encoder, tmp_path):
    return generator_targets(generator) | encoder_targets(encoder) | other_targets(generator, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_wild_arguments_give_a_result_or_a_sentence(generator, encoder, tmp_path):
    refused = tries(CALLS, SEED, all_targets(generator, encoder, tmp_path))
    assert CALLS / 4 < refused < CALLS  # some are right, too


@pytest.mark.fuzz
@pytest.mark.filterwarnings("ignore")
def test_many_wild_arguments_give_a_result_or_a_sentence(generator, encoder, tmp_path):
    tries(SLOW_CALLS, SEED + 1, all_targets(generator, encoder, tmp_path))


PROMPT = "the cat sat on the mat"
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_tokens", "did you mean max_new_tokens?"),
        ("temprature", "did you mean temperature?"),
        ("max_new_token", "did you mean max_new_tokens?"),
        ("TopK", "did you mean top_k?"),
        ("beam_width", "did you mean num_beams?"),
        ("ignore_eos", "did you mean eos_token_id?"),
        ("n", "each prompt gets one answer"),
        ("streamer", "call stream() instead"),
        ("qqqq", "it takes bad_words_ids, "),
    ],
)
def test_an_unknown_option_names_what_was_meant(generator, name, hint):
    for call, given in ((generator.generate, PROMPT), (generator.chat, [{"role": "user", "content": "x"}])):
        with pytest.raises(UsageError) as refusal:
            call(given, **{name: 1})
        assert f"unknown option {name} of {call.__name__}()" in str(refusal.value)
        assert hint in str(refusal.value)


def test_other_functions_name_it_too(encoder, tmp_path):
    exported = {"model": tmp_path, "vocab": make_vocab([0], 2), "output": "o"}
    for call, given, hint in (
        (trimserve.profile, {"corpus": "a", "model": "b", "colunm": "x"}, "did you mean text_column?"),
        (trimserve.profile, {"corpus": "a", "model": "b", "column": "x"}, "did you mean text_column?"),
        (trimserve.load, {"path": tmp_path, "n_threads": 2}, "did you mean threads?"),
        (trimserve.select, {"profiles": None, "converage": 0.9}, "did you mean coverage?"),
        (encoder.encode, {"texts": [], "normalize_embeddings": True}, "did you mean normalize?"),
        (encoder.encode, {"texts": [], "device": "cpu"}, "the device is chosen by trimserve.load"),
        (trimserve.export, exported | {"force": True}, "did you mean overwrite?"),
    ):
        with pytest.raises(UsageError) as refusal:
            call(**given)
        assert hint in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "values"),
    {
        "max_new_tokens": [None, 0, -1, True, 1.5, "3", NAN],
        "temperature": ["0.7", NAN, INF, -1, 1e-30, 1e-7, True],
        "top_k": [1.0, -1, "5"],
        "top_p": [0, 1.1, NAN, "1"],
        "min_p": [-0.1, 1.1, NAN],
        "stop": ["", [""], ["a", ""], 5, [5], b"x"],
        "seed": [-1, 2**64, 1.0, "1", True],
        "logit_bias": [{-1: 1.0}, {2**40: 1.0}, {"5": 1.0}, {5: NAN}, {5: INF}, {True: 1.0}, [5], {5: "x"}],
        "eos_token_id": [-1, [-1], 2**40, [2**31 - 1], "5", 1.0],
        "suppress_tokens": [[-1], [2**31 - 1], 5, ["a"]],
        "bad_words_ids": [[5], [[]], [[-1]], [["a"]]],
        "mode": ["fast", 1, True],
        "certify": [1, "yes"],
        "text_drafts": [1, "yes"],
        "logits_processor": ["x", 5],
        "num_beams": [0, 1.0, 10**6],
        "early_stopping": ["always", 1],
    }.items(),
)
@pytest.mark.parametrize("mode", ["exact", "compact"])
def test_wrong_values_are_refused_in_one_sentence(generator, name, values, mode):
    own = {} if name in ("mode", "certify") else {"mode": mode}
    for value in values:
        with pytest.raises(UsageError, match=name):
            generator.generate(PROMPT, **{"max_new_tokens": 2, **own, name: value})


def test_ids_up_to_the_last_row_are_taken_and_no_more(generator):
    size = generator.folder.vocab.vocab_size
    for mode in ("exact", "compact"):
        generator.generate(PROMPT, max_new_tokens=2, mode=mode, logit_bias={size - 1: -1.0, np.int64(0): 1})
        with pytest.raises(UsageError, match="ids go from 0 to"):
            generator.generate(PROMPT, max_new_tokens=2, mode=mode, logit_bias={size: 1.0})


@pytest.mark.parametrize("mode", ["exact", "compact"])
def test_numbers_of_numpy_are_numbers(generator, mode):
    given = {"max_new_tokens": 4, "temperature": 0.5, "top_k": 5, "seed": 3, "logit_bias": {7: 2.0}}
    arrays = {
        "max_new_tokens": np.int32(4),
        "temperature": np.float64(0.5),
        "top_k": np.uint8(5),
        "seed": np.int64(3),
        "logit_bias": {np.int32(7): np.float32(2)},
    }
    (expected,), (found,) = (generator.generate(PROMPT, mode=mode, **each) for each in (given, arrays))
    assert found.ids == expected.ids


@pytest.mark.parametrize("mode", ["exact", "compact"])
def test_the_least_temperature_is_greedy(generator, mode):
    (greedy,) = generator.generate(PROMPT, max_new_tokens=12, temperature=0, mode=mode)
    (cold,) = generator.generate(PROMPT, max_new_tokens=12, temperature=1e-6, mode=mode)
    assert cold.ids == greedy.ids


def test_one_stop_string_is_one(generator):
    (plain,) = generator.generate(PROMPT, max_new_tokens=12)
    absent = plain.text[-1] + plain.text[0] + "\u2042"
    (found,) = generator.generate(PROMPT, max_new_tokens=12, stop=absent)
    assert found.text == plain.text
    (found,) = generator.generate(PROMPT, max_new_tokens=12, stop=plain.text[2:4])
    assert found.text == plain.text[: plain.text.index(plain.text[2:4])]


@pytest.mark.parametrize(
    ("processor", "error"),
    [
        (lambda _, logits: logits * np.float32(NAN), UsageError),
        (lambda _, logits: np.full_like(logits, INF), UsageError),
        (lambda _, logits: logits[:-1], UsageError),
        (lambda _, logits: logits[None], UsageError),
        (lambda *_: None, UsageError),
        (lambda *_: "x", UsageError),
        (lambda _, logits: logits.astype(str).tolist()[:1], UsageError),
        (lambda _, logits: np.full_like(logits, -INF), NoTokenError),
    ],
)
@pytest.mark.parametrize("options", [{}, {"mode": "compact"}, {"temperature": 1.0}, {"num_beams": 2}])
def test_what_a_processor_returns_is_checked(generator, processor, error, options):
    with pytest.raises(error):
        generator.generate(PROMPT, max_new_tokens=3, logits_processor=processor, **options)


def test_texts_are_texts(generator, encoder):
    for wrong in (b"x", None, 5, [5], [["a"]], [b"x"], ["\ud800"], "\ud800", {"a": 1}):
        for call in (generator.generate, generator.score, encoder.encode, encoder.forward):
            with pytest.raises(UsageError):
                call(wrong)
    assert generator.generate([]) == []
    assert encoder.encode([]).shape == (0, encoder.dimension)
    (expected,) = encoder.encode(["a"])
    for listed in (("a",), np.array(["a"]), iter(["a"]), {"a": 1}.keys()):
        assert (encoder.encode(listed) == expected).all()
    for size in (0, -1, True, 2.0, None):
        with pytest.raises(UsageError, match="batch_size"):
            encoder.encode(["a"], batch_size=size)


def test_arguments_in_a_row_are_counted(generator, tmp_path):
    with pytest.raises(UsageError, match="needs prompts"):
        generator.generate()
    with pytest.raises(UsageError, match="takes 2 values in a row, found 3"):
        generator.generate(PROMPT, 5)
    with pytest.raises(UsageError, match="got path twice"):
        trimserve.load(tmp_path, path=tmp_path)
    for threads in (0, "2", 1.0, True):
        with pytest.raises(UsageError, match=r"threads should be (a whole number, )?from 1 to 1024"):
            trimserve.load(tmp_path, threads=threads)
    for device in ("gpu", 0, "CUDA:0"):
        with pytest.raises(UsageError, match="device should be one of cpu, cuda"):
            trimserve.load(tmp_path, device=device)
    for path in (None, 5, b"x", "", "\0", ["x"]):
        with pytest.raises(UsageError, match="path should be a path"):
            trimserve.load(path)


def test_a_stream_refuses_before_it_begins(generator):
    with pytest.raises(UsageError, match="did you mean max_new_tokens"):
        generator.stream(PROMPT, max_tokens=3)  # not drawn from


# What shows that an option is heeded: the option, beside others; it must change what the others alone give.
EFFECTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "max_new_tokens": (3, {}),
    "max_length": (40, {}),
    "min_new_tokens": (8, {"eos": True}),
    "min_length": (60, {"eos": True}),
    "eos_token_id": ("third", {}),
    "stop": ("text", {}),
    "stop_strings": ("text", {}),
    "mode": ("compact", {}),
    "report_mass": (True, {"mode": "compact"}),
    "max_block": (1, {}),
    "certify": (False, {}),
    "text_drafts": (False, {}),
    "presence_penalty": (1e3, {}),
    "frequency_penalty": (1e3, {}),
    "logit_bias": ({7: 1e6}, {}),
    "logits_processor": (lambda _, logits: -np.abs(logits), {}),
    "seed": (9, {"temperature": 5.0}),
    "do_sample": (True, {}),
    "temperature": (50.0, {}),
    "top_k": (1, {"temperature": 50.0}),
    "top_p": (1e-6, {"temperature": 50.0}),
    "min_p": (1.0, {"temperature": 50.0}),
    "top_h": (1e-6, {"temperature": 50.0}),
    "typical_p": (1e-6, {"temperature": 50.0}),
    "epsilon_cutoff": (0.9, {"temperature": 50.0}),
    "eta_cutoff": (0.9, {"temperature": 50.0}),
    "repetition_penalty": (1e3, {}),
    "encoder_repetition_penalty": (1e5, {}),
    "no_repeat_ngram_size": (1, {}),
    "encoder_no_repeat_ngram_size": (1, {"logit_bias": {"prompt": 1e6}}),
    "bad_words_ids": ([["third"]], {}),
    "sequence_bias": ([[[7], 1e6]], {}),
    "suppress_tokens": (["third"], {}),
    "begin_suppress_tokens": (["first"], {}),
    "forced_bos_token_id": (7, {"prompt": "one"}),
    "forced_eos_token_id": (7, {}),
    "exponential_decay_length_penalty": ((0, 50.0), {"eos_token_id": 7}),
    "remove_invalid_values": (True, {}),
    "bos_token_id": (7, {"prompt": ""}),
    "num_beams": (5, {}),
    "length_penalty": (-20.0, {"num_beams": 3, "eos": True}),
    "early_stopping": (True, {"num_beams": 3, "eos": True}),
}
# No id can show them in a model of sound numbers; see tests/generation/test_settings.py.
UNSEEN = {"remove_invalid_values", "renormalize_logits", "early_stopping"}
REFUSED = {"decoder_start_token_id": 5}


def with_marks(entry, marks):
    """A value with the words of `EFFECTS` replaced by what they stand for."""
    if isinstance(entry, list):
        return [with_marks(each, marks) for each in entry]
    return marks.get(entry, entry) if isinstance(entry, str) else entry


def effect(generator, name):
    """What a call gives without an option, and with it."""
    (plain,) = generator.generate(PROMPT, max_new_tokens=12)
    prompt_ids = generator.codec.encode([PROMPT])[0].tolist()
    marks = {"first": plain.ids[0], "third": plain.ids[2], "text": plain.text[2:4]}
    value, beside = EFFECTS[name][0], dict(EFFECTS[name][1])
    prompt = beside.pop("prompt", PROMPT)
    if prompt == "one":
        prompt = next(text for text in "abcdefgh" if generator.codec.encode([text])[0].size == 1)
    if beside.pop("eos", False):
        beside["eos_token_id"] = [plain.ids[2]]
    if "logit_bias" in beside:
        beside["logit_bias"] = dict.fromkeys(prompt_ids, 1e6)
    if name not in ("max_length", "min_length"):
        beside["max_new_tokens"] = 12
    elif name == "max_length":
        value = len(prompt_ids) + 3
    for seed in range(8) if "temperature" in beside and name != "seed" else (0,):
        (without,) = generator.generate(prompt, **{"seed": seed, **beside})
        (found,) = generator.generate(prompt, **{"seed": seed, **beside, name: with_marks(value, marks)})
        if found.ids != without.ids:
            break
    return without, found


@pytest.mark.parametrize(
    "name", sorted({*NAMES} - {*REFUSED} - UNSEEN - {"certify", "max_block", "text_drafts"})
)
def test_each_option_has_an_effect(generator, name):
    without, found = effect(generator, name)
    assert found != without
    assert name == "report_mass" or (found.ids, found.text) != (without.ids, without.text)


def test_options_of_exact_mode_change_how_and_not_what(generator):
    for name in ("certify", "max_block", "text_drafts"):
        without, found = effect(generator, name)
        assert found.ids == without.ids
    assert generator.plan({"certify": False}).certify is False
    assert generator.plan({"max_block": 1}).max_block == 1


def test_options_of_other_models_are_refused(generator):
    for name, value in REFUSED.items():
        with pytest.raises(UsageError, match=name):
            generator.generate(PROMPT, **{name: value})


@pytest.mark.parametrize(
    ("options", "about"),
    [
        ({"top_k": 3}, "top_k is about sampling"),
        ({"length_penalty": 2.0}, "length_penalty is about beams"),
        ({"early_stopping": True}, "early_stopping is about beams"),
        ({"mode": "compact", "max_block": 4}, "max_block is about the drafts"),
        ({"mode": "compact", "certify": False}, "certify is about the drafts"),
        ({"num_beams": 2, "text_drafts": True}, "text_drafts means nothing to a beam search"),
        ({"num_beams": 2, "certify": True}, "certify is about the drafts"),
        ({"num_beams": 2, "stop": "x"}, "stop means nothing to a beam search"),
        ({"report_mass": True}, "report_mass tells what compact mode gives up"),
        ({"max_new_tokens": 5, "max_length": 9}, "limit the same"),
        ({"min_new_tokens": 5, "min_length": 9}, "limit the same"),
    ],
)
def test_what_would_be_ignored_is_refused(generator, options, about):
    with pytest.raises(UsageError, match=about):
        generator.generate(PROMPT, **options)


@pytest.mark.parametrize(
    "settings", [{"temperature": "hot"}, {"top_p": 2.0}, {"max_length": 0}, {"bad_words_ids": [5]}]
)
def test_a_folders_own_settings_are_checked_when_it_is_loaded(generator, tmp_path, settings):
    with pytest.raises(MismatchError, match=next(iter(settings))):
        with_template(generator.folder.path, tmp_path, **settings)


def test_a_growing_penalty_stays_a_number():
    edits = LogitEdits(exponential_decay_length_penalty=(0, 1e6))
    grown = edits.hasten_ends(np.array([3.0, -3.0], np.float32), 5000)
    assert np.isfinite(grown).all()
    assert (grown > 1e9).all()


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (["a", "b"], ["a", "b"]),
        (("a", "b"), ("a", "b")),
        ([("a", "b"), "c"], [("a", "b"), "c"]),
        ([["a", "b"], "c"], [("a", "b"), "c"]),
        (("a", "b", "c"), ["a", "b", "c"]),
    ],
)
def test_two_texts_in_a_list_are_no_pair(value, read):
    text = str | tuple[str, str]
    assert kind_of(text | Sequence[text]).read(value) == read
