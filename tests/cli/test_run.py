"""`trimserve run` through the command line's own entry, on tiny exported models of every task."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("torch")

from tests.support.folders import make_vocab
from tests.support.models import save_model
from tests.support.rounding import gamma
from tests.support.tiny_tokenizers import CHAT_TEMPLATE
from trimserve.cli.main import main
from trimserve.loading import load
from trimserve.model.resolve import resolve_model
from trimserve.model.structural import structural_ids
from trimserve_export.pipeline import export

pytestmark = pytest.mark.export


@pytest.fixture
def run(capsys, monkeypatch):
    """Run `trimserve run` and give exit code, stdout and stderr."""

    def call(folder, *words, stdin: bytes = b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = main(["run", str(folder), *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def run_json(run):
    def call(*words, **options):
        code, out, err = run(*words, "--format", "json", **options)
        assert (code, err) == (0, "")
        return json.loads(out)

    return call


def trimmed(path, family, *, cold=True, **settings):
    """Export a tiny model with a chat template and half of its ids."""
    source_path = save_model(family, path / "model", **settings)
    (source_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    source = resolve_model(source_path)
    kept = np.union1d(structural_ids(source), np.arange(0, source.vocab_size, 2))
    vocab = make_vocab(kept, source.vocab_size, source.tokenizer_sha256)
    export(source, vocab, path / "trimmed", progress=False, cold=cold)
    return path / "trimmed"


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    return trimmed(tmp_path_factory.mktemp("generator"), "qwen3", tokenizer="byte_level_bpe")


@pytest.fixture(scope="module")
def encoder(exported):
    return exported("bert_encoder").folder.path


def test_embeddings_as_json(run_json, encoder):
    texts = ["the cat sat", "dog", ""]
    found = run_json(encoder, *texts)
    model = load(encoder)
    np.testing.assert_array_equal(np.array(found["embeddings"], np.float32), model.encode(texts))
    assert found["tokens"] == model.stats.tokens
    assert found["cold_tokens"] == model.stats.cold_tokens > 0
    assert found["seconds"] > 0
    assert found["task"] == "feature-extraction"


def test_embeddings_for_people(run, encoder):
    code, out, _ = run(encoder, "the cat sat", "dog")
    header, _, first, second = out.splitlines()
    assert code == 0
    assert header.split() == ["text", "numbers", "norm", "embedding"]
    assert first.startswith("'the cat sat'")
    assert second.split()[:2] == ["'dog'", "16"]


def test_texts_from_stdin_are_lines_with_the_empty_ones(run_json, encoder):
    expected = run_json(encoder, "the cat", "", "dog")["embeddings"]
    assert run_json(encoder, stdin=b"the cat\n\ndog\n")["embeddings"] == expected
    assert run_json(encoder, "the cat", "-", stdin=b"\r\ndog")["embeddings"] == expected


def test_search_prints_the_nearest_texts(run, run_json, encoder, tmp_path):
    corpus = tmp_path / "corpus.txt"
    lines = ["the dog", "", "the cat sat on the mat", "latte", "the cat sat"]
    corpus.write_text("\n".join(lines))
    found = run_json(encoder, "the cat sat", "latte", "--corpus", corpus, "--top", 2, "--batch-size", 2)
    assert [hits[0]["text"] for hits in found["hits"]] == ["the cat sat", "latte"]
    # Two rows of 16 numbers made 1 long, and their product. In a batch a row may be rounded otherwise,
    # which turns it by little, and the cosine by the square of that.
    rounding = gamma(3 * (16 + 4))
    assert found["hits"][0][0]["cosine"] == pytest.approx(1, abs=rounding)
    assert found["hits"][0][1]["cosine"] < 1 - rounding
    assert found["hits"][1][0]["index"] == 2  # of the texts; the empty line is none
    assert (found["corpus_texts"], [len(hits) for hits in found["hits"]]) == (4, [2, 2])
    _, out, _ = run(encoder, "latte", "--corpus", corpus)
    assert out.splitlines()[0].split() == ["latte", "cosine"]
    assert out.splitlines()[2].split() == ["latte", "1.000"]
    assert len(out.splitlines()) == 6


def test_search_in_records(run_json, encoder, tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"body": "the dog"}\n{"body": "the\\ncat"}\n')
    found = run_json(encoder, "the cat", "--corpus", corpus, "--text-column", "body")
    assert found["hits"][0][0]["text"] == "the\ncat"


def test_masks_are_filled(run, run_json, exported):
    folder = exported("bert").folder.path
    found = run_json(folder, "the [MASK] sat", "--top", 3)
    model = load(folder)
    ((expected,),) = model.fill_mask(["the [MASK] sat"], top_k=3)
    ids = [candidate["token"] for candidate in found["masks"][0][0]]
    assert ids == [candidate.id for candidate in expected]
    ((only,),) = run_json(folder, "the [MASK] sat", "--targets", "dog")["masks"]
    assert [candidate["token_str"] for candidate in only] == ["dog"]
    code, out, _ = run(folder, "the [MASK] sat")
    assert code == 0
    assert len(out.splitlines()) == 7
    code, _, err = run(folder, "the cat sat")
    assert code == 2
    assert err == "trimserve: text 'the cat sat' has no mask: write [MASK] where a token is to be found.\n"


def test_texts_are_classified(run, run_json, exported):
    exported_model = exported("bert_classifier")
    folder = exported_model.folder.path
    (found,) = run_json(folder, "the cat")["labels"]
    logits = load(folder).forward("the cat")[0]
    assert found[0]["label"] == f"LABEL_{logits.argmax()}"
    assert sum(label["score"] for label in found) == pytest.approx(1)
    code, out, _ = run(folder, "the cat")
    assert (code, out.splitlines()[2].split()[2]) == (0, found[0]["label"])
    assert run_json(folder, "the cat", "--top", 2)["labels"] == [found[:2]]
    code, _, err = run(folder, "the cat", "--aggregation", "max")
    assert (code, "(--aggregation is for token-classification)" in err) == (2, True)


def test_tokens_are_tagged(run, run_json, exported):
    folder = exported("bert_tagger").folder.path
    (found,) = run_json(folder, "the cat")["entities"]
    assert [(entry["word"], entry["start"], entry["end"]) for entry in found] == [
        ("the", 0, 3),
        ("cat", 4, 7),
    ]
    logits = load(folder).forward("the cat")[0]
    assert [entry["entity"] for entry in found] == [f"LABEL_{row.argmax()}" for row in logits[1:-1]]
    assert run(folder, "the cat", "--aggregation", "average")[0] == 0


def test_a_cut_text_is_said(run, encoder, caplog):
    assert run(encoder, "the cat " * 200, "the cat")[0] == 0
    assert caplog.messages == ["texts cut to the model's 64 tokens: 1"]


def test_generation_streams_what_it_generates(run, run_json, generator):
    prompts = ["The cat", "What is 12 and 30?", "The dog", ""]
    found = run_json(generator, *prompts, "--max-new-tokens", 9)
    code, out, err = run(generator, *prompts, "--max-new-tokens", 9)
    assert (code, err) == (0, "")
    assert out == "".join(f"{text}\n" for text in found["texts"])
    model = load(generator)
    expected = model.generate(prompts, max_new_tokens=9)
    assert found["texts"] == [result.text for result in expected]
    assert found["ids"] == [list(result.ids) for result in expected]
    assert (found["mode"], found["tokens"]) == ("exact", model.stats.tokens)
    assert {"drafted", "rejected", "cold_tokens", "seconds"} <= found.keys()
    assert found["cold_reads"]["steps"] >= found["tokens"]
    assert found["cold_reads"].keys() == {"steps", "certified_share", "rows", "bytes_per_token"}


def test_sampling_options_reach_the_model(run_json, generator):
    options = ("--temperature", 0.9, "--top-k", 20, "--top-p", 0.9, "--min-p", 0.01, "--seed", 3)
    found = run_json(
        generator, "The dog", *options, "--max-new-tokens", 8, "--stop", "zzz", "--mode", "compact"
    )
    model = load(generator)
    (expected,) = model.generate(
        "The dog",
        temperature=0.9,
        top_k=20,
        top_p=0.9,
        min_p=0.01,
        seed=3,
        max_new_tokens=8,
        stop=["zzz"],
        mode="compact",
    )
    assert found["ids"] == [list(expected.ids)]
    assert found["mode"] == "compact"
    assert run_json(generator, "The dog", *options, "--seed", 4, "--max-new-tokens", 8)["ids"] != found["ids"]


def test_output_ends_before_a_stop_string(run, run_json, generator):
    words = ("The dog", "--max-new-tokens", 12)
    (text,) = run_json(generator, *words)["texts"]
    stop = text[-3:-1]
    found = run_json(generator, *words, "--stop", stop)
    assert found["texts"] == [text[: text.index(stop)]]
    assert found["stopped"] == ["stop"]
    assert run(generator, *words, "--stop", stop)[1] == found["texts"][0] + "\n"


def test_a_prompt_from_stdin_is_one_text(run_json, generator):
    expected = run_json(generator, "user: hi\nassistant:", "--max-new-tokens", 5)["ids"]
    assert run_json(generator, "--max-new-tokens", 5, stdin=b"user: hi\nassistant:\n")["ids"] == expected


def test_chat_goes_through_the_template(run, run_json, generator):
    prompt = "<|turn|>user\nhi<|end|>\n<|turn|>assistant\n"
    expected = run_json(generator, prompt, "--max-new-tokens", 5)
    found = run_json(generator, "hi", "--chat", "--max-new-tokens", 5)
    assert found["ids"] == expected["ids"]
    assert run(generator, "hi", "--chat", "--max-new-tokens", 5)[1] == found["texts"][0] + "\n"


def test_compact_mode_reports_what_it_cannot_produce(run, run_json, generator):
    options = ("The dog", "--mode", "compact", "--report-mass", "--max-new-tokens", 4)
    (mass,) = run_json(generator, *options)["cold_mass"]
    assert 0 < mass < 1
    assert f"{mass:.4g}" in run(generator, *options)[1]


def test_verbose_tells_the_counts_on_stderr(run, generator):
    code, out, err = run(generator, "The dog", "--max-new-tokens", 4, "-v")
    assert code == 0
    assert "4 tokens in" in err
    assert "drafted" not in out


def test_a_folder_without_cold_rows_generates_from_split_tokens(run_json, tmp_path):
    folder = trimmed(tmp_path, "llama_tied", tokenizer="byte_level_bpe", cold=False)
    found = run_json(folder, "What is the total of 12 and 30?", "--max-new-tokens", 4)
    assert found["mode"] == "compact"
    assert found["cold_tokens"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "--temperature", "1"], "does feature-extraction, for which --temperature means nothing"),
        (["a", "--chat", "--seed", "1"], "--seed, --chat"),
        (["a", "--corpus", "missing.txt"], "missing.txt does not exist"),
        (["a", "--top", "3"], "--top means nothing (--top is for --corpus)"),
        (["a", "--corpus", "pyproject.toml", "--top", "0"], "has none of the formats"),
        (["a", "--text-column", "text"], "--text-column means nothing (--text-column is for --corpus)"),
        (["a", "--batch-size", "0"], "batch_size should be 1 or more, found 0"),
    ],
)
def test_bad_arguments_of_an_encoder(run, encoder, words, message):
    code, out, err = run(encoder, *words)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a", "--corpus", "x.txt"], "for which --corpus means nothing"),
        (["a", "--temperature", "-1"], "temperature"),
        (["a", "--top-p", "2"], "top_p"),
        (["a", "--max-new-tokens", "-1"], "max_new_tokens should be 1 or more"),
        (["a", "--stop", ""], "stop should be a text that is not empty"),
        (["a", "--report-mass"], "exact mode gives up nothing"),
        (["a", "--seed", "1"], "--seed is about sampling, and nothing is sampled here"),
        (["a", "--temperature", "0", "--top-k", "5"], "--top-k is about sampling"),
        (["a", "--temperature", "0", "--do-sample"], "--do-sample samples and --temperature 0 does not"),
        (["a", "--temperature", "0.5", "--no-do-sample"], "--no-do-sample does not"),
        (["a", "--length-penalty", "2"], "length_penalty is about beams"),
        (["a", "--min-new-tokens", "5", "--max-new-tokens", "3"], "--min-new-tokens 5 is more than the 3"),
        (["a", "--pairs"], "for which --pairs means nothing"),
        (["-", "a", "-"], "stdin (-) can be read only once"),
        (["a", "--threads", "0"], "threads should be from 1 to 1024"),
        (["a", "--num-beams", "2", "--length-penalty", "nan", "--format", "json"], "length_penalty"),
    ],
)
def test_bad_arguments_of_a_generator(run, generator, words, message):
    code, out, err = run(generator, *words)
    assert (code, out) == (2, "")
    assert message in err


def test_exact_mode_needs_cold_rows(run, tmp_path):
    folder = trimmed(tmp_path, "llama", tokenizer="byte_level_bpe", cold=False)
    code, _, err = run(folder, "a", "--mode", "exact")
    assert code == 2
    assert "without --no-cold" in err


def test_bytes_that_are_no_text_are_named(run, encoder):
    code, _, err = run(encoder, stdin=b"the cat \xff")
    assert code == 2
    assert err == (
        "trimserve: stdin: byte 0xff at 8 is not UTF-8: convert the text, for example with iconv.\n"
    )


def test_a_folder_that_is_none(run, tmp_path):
    code, _, err = run(tmp_path, "a")
    assert code == 2
    assert "is not a trimmed folder" in err


def test_a_changed_file_is_found_before_anything_runs(run, encoder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in encoder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    content = (copy / "tokenizer.json").read_bytes()
    (copy / "tokenizer.json").write_bytes(content.replace(b"cat", b"act"))
    code, out, err = run(copy, "the cat")
    assert (code, out) == (1, "")
    assert "tokenizer.json has changed" in err


def test_a_missing_onnxruntime_names_the_command(run, encoder, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, _, err = run(encoder, "a")
    assert code == 1
    assert "pip install 'trimserve[cpu]'" in err


def test_running_an_encoder_loads_no_heavy_package(encoder):
    script = (
        "import sys; from trimserve.cli.main import main; main(['run', sys.argv[1], 'the cat']); "
        "print(sorted({'torch', 'transformers', 'onnx', 'onnx_ir', 'trimserve_export', 'jinja2', "
        "'huggingface_hub', 'pyarrow'} & set(sys.modules)), file=sys.stderr)"
    )
    command = [sys.executable, "-c", script, str(encoder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"


def test_a_reader_that_leaves_is_no_error(generator):
    command = f"{sys.executable} -m trimserve run {generator} 'The cat' | head -c 0"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert "Traceback" not in done.stderr
