"""`trimserve export` on the command line."""

import argparse
import dataclasses
import inspect
import json

import pytest

pytest.importorskip("torch")

from tests.support.folders import make_vocab
from tests.support.models import save_model
from trimserve.cli.commands.export import add_arguments
from trimserve.cli.main import main
from trimserve.files.hashes import sha256_file
from trimserve.folder.opening import open_folder
from trimserve.vocab.file import load_vocab, save_vocab
from trimserve_export import export
from trimserve_export.options import Options

pytestmark = pytest.mark.export

V = 37


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_model("bert_encoder", tmp_path_factory.mktemp("bert") / "model", rows=V)


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("the cat sat on the mat.\nthe dog sat on the cat!\n", "utf-8")
    return path


def test_corpus_in_trimmed_folder_out(source, corpus, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["export", "-m", str(source), "-o", str(out), "--corpus", str(corpus), "--format", "json"]
    assert main(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    keys = {"kept", "vocab_size", "bytes_before", "bytes_after", "files", "seconds", "peak_rss_bytes"}
    assert document.keys() >= keys
    folder = open_folder(out, verify="full")
    assert document["kept"] == len(folder.vocab)
    assert folder.vocab.rule["sources"][0]["sha256"] == sha256_file(corpus)
    assert document["files"].keys() == {path.name for path in out.iterdir()}


def test_profile_and_select_options(source, corpus, tmp_path):
    profile = tmp_path / "p.safetensors"
    assert main(["profile", str(corpus), "-m", str(source), "-o", str(profile)]) == 0
    out = tmp_path / "out"
    options = ["--profile", str(profile), "--top-k", "20", "--keep-token", "dog"]
    assert main(["export", "-m", str(source), "-o", str(out), *options]) == 0
    rule = load_vocab(out / "vocab_map.safetensors").rule
    assert rule["options"]["top_k"] == 20
    assert rule["reasons"]["explicit"] == 1


def test_profiles_are_merged_with_one_word_on_what_both_hold(source, corpus, tmp_path, caplog):
    profiles = [str(tmp_path / f"{name}.safetensors") for name in "ab"]
    for profile in profiles:
        assert main(["profile", str(corpus), "-m", str(source), "-o", profile]) == 0
    options = ["--profile", *profiles, "--layout", "tokenizer"]
    assert main(["export", "-m", str(source), "-o", str(tmp_path / "out"), *options]) == 0
    assert caplog.text.count("counted more than once") == 1


def test_an_option_has_one_name_everywhere():
    """The dataclass is the source: `trimserve.export` and the command line have an option for each field."""
    names = {field.name for field in dataclasses.fields(Options)}
    others = {"adapter", "overwrite", "revision", "profile", "sample", "calibration", "progress"}
    keywords = {p.name for p in inspect.signature(export).parameters.values() if p.kind == p.KEYWORD_ONLY}
    assert keywords == names | others
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert names <= {action.dest for action in parser._actions}
    defaults = {field.name: field.default for field in dataclasses.fields(Options)}
    assert {name: parser.get_default(name) for name in names} == defaults


def test_vocab_file_and_human_output(source, tmp_path, capsys):
    digest = sha256_file(source / "tokenizer.json")
    save_vocab(make_vocab(range(11), V, digest), tmp_path / "v.safetensors")
    arguments = [
        "export",
        "-m",
        str(source),
        "-o",
        str(tmp_path / "out"),
        "--vocab",
        str(tmp_path / "v.safetensors"),
    ]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "vocab rows" in text
    assert "29.73 %" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--vocab --profile --corpus"),
        (["--vocab", "v", "--coverage", "0.9"], "leave out the options that select"),
        (["--vocab", "v", "--keep-token", "cat"], "leave out the options that select"),
        (["--vocab", "no-such-file"], "no-such-file"),
        (["--corpus", "{corpus}", "--layout", "graph", "--to", "safetensors"], "makes none"),
        (["--corpus", "{corpus}", "--exporter", "optimum", "--device", "cuda"], "use --exporter genai"),
        (["--corpus", "{corpus}", "--task", "summarising"], "summarising"),
        (["--corpus", "{corpus}", "--no-cold", "--sketch", "int4"], "--sketch bounds the cold rows"),
        (["--corpus", "{corpus}", "--vocab-bits", "8"], "--vocab-bits says how --quantize rounds"),
        (["--corpus", "{corpus}", "--calibrate", "{corpus}"], "--calibrate says how --quantize rounds"),
        (["--corpus", "{corpus}", "--no-calibration"], "--no-calibration says how --quantize rounds"),
        (
            ["--corpus", "{corpus}", "--quantize", "int4", "--calibrate", "{corpus}", "--no-calibration"],
            "--calibrate gives texts that --no-calibration does without",
        ),
        (
            ["--corpus", "{corpus}", "--quantize", "int4", "--device", "cuda", "--calibrate", "{corpus}"],
            "--calibrate means nothing to the builder",
        ),
        (
            ["--vocab", "v", "--quantize", "int4", "--no-calibration", "--unit", "line"],
            "say how files are read",
        ),
        (
            ["--corpus", "{corpus}", "--to", "safetensors", "--exporter", "optimum"],
            "--exporter makes a graph",
        ),
        (["--corpus", "{corpus}", "--to", "safetensors", "--device", "cuda"], "--device is about a graph"),
        (["--corpus", "{corpus}", "--link"], "--link is about the weights of ONNX graphs"),
        (["--corpus", "{corpus}", "--base", "x"], "--base names the model that a compact checkpoint"),
        (["--corpus", "{corpus}", "--revision", "x"], "which has no revisions"),
    ],
)
def test_bad_arguments_are_named(source, corpus, tmp_path, capsys, options, message):
    options = [option.format(corpus=corpus) for option in options]
    code = main(["export", "-m", str(source), "-o", str(tmp_path / "out"), *options])
    assert code in (1, 2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_target_is_checked_before_any_work(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "own.txt").write_text("mine")
    code = main(
        ["export", "-m", "no-such-model", "-o", str(tmp_path / "out"), "--corpus", "x.txt", "--overwrite"]
    )
    assert code == 2
    assert "not made by trimserve" in capsys.readouterr().err


def test_layout_tokenizer_tells_how_segmentation_changes(source, corpus, tmp_path, capsys):
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("the cat\nun dog\n\nthe mat\n", "utf-8")
    options = ["--layout", "tokenizer", "--corpus", str(corpus), "--top-k", "16"]
    arguments = ["export", "-m", str(source), *options]
    assert main([*arguments, "-o", str(tmp_path / "a"), "--held-out", str(held_out)]) == 0
    assert "of 3 held-out texts" in capsys.readouterr().out
    assert main([*arguments, "-o", str(tmp_path / "b"), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)["segmentation"]
    assert (found["texts"], found["held_out"]) == (2, False)
    assert found == open_folder(tmp_path / "b").manifest.segmentation


def test_corpora_are_read_by_the_options_of_profile(source, tmp_path, capsys):
    rows = tmp_path / "rows.csv"
    rows.write_text("q,a\nthe cat,sat\nthe mat,dog\n", "utf-8")
    reading = ["--text-column", "q", "--output-column", "a"]
    profile = tmp_path / "p.safetensors"
    assert main(["profile", str(rows), "-m", str(source), "-o", str(profile), *reading]) == 0
    export = ["export", "-m", str(source), "--layout", "tokenizer", "--top-k", "16", "--format", "json"]
    found = []
    for name, ids in (("a", ["--corpus", str(rows)]), ("b", ["--profile", str(profile)])):
        capsys.readouterr()
        assert main([*export, "-o", str(tmp_path / name), *ids, *reading]) == 0
        segmentation = json.loads(capsys.readouterr().out)["segmentation"]
        vocab = load_vocab(tmp_path / name / "vocab_map.safetensors")
        found.append((vocab.kept_ids.tolist(), vocab.rule["output_coverage"], segmentation["texts"]))
    assert found[0] == found[1]
    assert found[0][2] == 4  # two prompts, two completions
    # Without the options the profiled rows cannot be read again, so nothing is compared.
    assert main([*export, "-o", str(tmp_path / "c"), "--profile", str(profile)]) == 0
    assert json.loads(capsys.readouterr().out)["segmentation"] is None


def test_options_of_reading_need_something_to_read(source, tmp_path, capsys):
    save_vocab(make_vocab(range(11), V, "0" * 64), tmp_path / "v.safetensors")
    arguments = ["export", "-m", str(source), "-o", str(tmp_path / "out"), "--chat"]
    assert main([*arguments, "--vocab", str(tmp_path / "v.safetensors")]) == 2
    assert "--corpus" in capsys.readouterr().err


def test_held_out_texts_need_the_layout(source, corpus, tmp_path, capsys):
    arguments = ["export", "-m", str(source), "-o", str(tmp_path / "out"), "--corpus", str(corpus)]
    assert main([*arguments, "--held-out", str(corpus)]) == 2
    assert "--held-out" in capsys.readouterr().err
