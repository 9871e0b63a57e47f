"""Arguments in any order, and the tables of options that mean nothing."""

import argparse
import json

import pytest

from tests.support.tiny_tokenizers import TEXT
from trimserve.cli import main as main_module
from trimserve.cli.arguments import byte_size
from trimserve.cli.commands import _options, run
from trimserve.cli.commands._options import DOINGS, OPTIONS, check_options
from trimserve.cli.inputs import read_texts
from trimserve.cli.main import main
from trimserve.errors import UsageError
from trimserve.folder.tasks import ENCODER_TASKS, GENERATOR_TASKS

VALUES = {
    "stop": ["x"],
    "targets": ["x"],
    "skip_bad": True,
    "chat": True,
    "pairs": True,
    "report_mass": True,
    "text_drafts": True,
}
CHOOSING = {"search": "corpus", "rank": "query", "pairs": "pairs"}


def parse(*words):
    return main_module._parse(list(words))


def options_of_run(task_options=None):
    args = argparse.Namespace(folder="F", **dict.fromkeys(OPTIONS))
    for name in task_options or ():
        setattr(args, name, VALUES.get(name, "1"))
    return args


@pytest.mark.parametrize(
    "words",
    [
        ("DIR", "a", "b", "--chat", "--max-new-tokens", "3"),
        ("DIR", "--chat", "a", "--max-new-tokens", "3", "b"),
        ("--chat", "--max-new-tokens", "3", "DIR", "a", "b"),
        ("--max-new-tokens=3", "DIR", "a", "--chat", "--", "b"),
    ],
)
def test_texts_and_options_come_in_any_order(words):
    args = parse("run", *words)
    assert (str(args.folder), args.texts, args.chat, args.max_new_tokens) == ("DIR", ["a", "b"], True, 3)


def test_what_looks_like_an_option_stands_behind_two_dashes():
    assert parse("run", "DIR", "-v", "--", "-x", "--chat").texts == ["-x", "--chat"]
    assert parse("run", "DIR", "-1", "-v", "").texts == ["-1", ""]


def test_every_command_with_words_takes_them_in_any_order():
    assert parse("profile", "a", "-m", "M", "b", "-o", "o").corpus == ["a", "b"]
    assert parse("merge", "a", "-o", "o", "b", "--weight", "1", "2").profiles == ["a", "b"]
    assert parse("diff", "a", "--top", "3", "b").after == "b"
    assert parse("report", "a", "-o", "x.html", "b").profiles == ["a", "b"]
    below = ("check", "a", "-m", "M", "b", "--vocab", "v", "c")
    args = parse("finetune", "--format", "json", *below)
    assert (args.action, args.corpus, args.format) == ("check", ["a", "b", "c"], "json")
    assert parse("finetune", *below, "--format", "json").format == "json"


@pytest.mark.parametrize(
    "words",
    [("-v", "run"), ("run", "DIR", "--unheard"), ("diff", "a"), ("diff", "a", "b", "c"), ("finetune",)],
)
def test_mistakes_are_usage_errors(words, capsys):
    assert main(list(words)) == 2
    assert "error: " in capsys.readouterr().err


def test_the_table_has_every_option_of_run():
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    declared = {action.dest for action in parser._actions}
    common = {"help", "folder", "texts", "device", "threads", "memory"}
    assert declared - common == set(OPTIONS)


@pytest.mark.parametrize("task", [*GENERATOR_TASKS, *ENCODER_TASKS])
def test_options_of_another_task_are_named(task):
    """Each option by itself: accepted for what the folder can do, else refused by name."""
    for name in OPTIONS:
        choosing = [
            CHOOSING[doing] for doing in DOINGS if doing in CHOOSING and name in DOINGS[doing].options
        ]
        shown = [
            doing
            for doing, entry in DOINGS.items()
            if task in entry.tasks and name in entry.options and (doing not in CHOOSING or name in choosing)
        ]
        args = options_of_run([name])
        if shown:
            check_options(args, task)
            continue
        with pytest.raises(UsageError, match=rf"F does {task}.*, for which --{name.replace('_', '-')} means"):
            check_options(args, task)


def test_a_search_takes_what_is_about_its_files():
    check_options(
        options_of_run(["corpus", "text_column", "unit", "top"]), "feature-extraction", sparse=False
    )
    check_options(options_of_run(["corpus", "top"]), "fill-mask", sparse=True)
    for names, task, sparse, message in (
        (["corpus"], "fill-mask", False, "--corpus means nothing"),
        (["targets"], "fill-mask", True, "--targets means nothing"),
        (["prompt"], "fill-mask", False, "--prompt means nothing"),
        (["corpus", "aggregation"], "feature-extraction", False, "with --corpus, for which --aggregation"),
        (["corpus", "query"], "text-classification", False, "--corpus and --query ask for different"),
        (["pairs", "top"], "text-classification", False, "with --pairs, for which --top"),
        (["seed", "chat"], "feature-extraction", False, "--seed, --chat mean nothing"),
    ):
        with pytest.raises(UsageError, match=message):
            check_options(options_of_run(names), task, sparse=sparse)
    assert _options.READING == ("text_column", "unit", "skip_bad", "max_line")


def test_sizes_have_units():
    assert [byte_size(text) for text in ("7", "64M", "2k", "1GiB", "3 kB")] == [
        7,
        1 << 26,
        2048,
        1 << 30,
        3072,
    ]
    for text in ("", "0", "-1", "x", "1T", "1.5M", "M", "9" * 13):
        with pytest.raises(argparse.ArgumentTypeError):
            byte_size(text)


def test_texts_of_a_corpus_are_rows_or_lines(tmp_path):
    table, lines = tmp_path / "a.csv", tmp_path / "b.txt"
    long = "word\n" * 40_000  # in parts, when it is counted
    table.write_text(f'id,text\n1,"{long}"\n2,the dog\n')
    lines.write_text("the cat\r\n\n the mat\n")
    assert read_texts(str(table), {"text_column": "text"}) == [long, "the dog"]
    assert read_texts(str(lines), {}) == ["the cat", " the mat"]
    assert read_texts(str(lines), {"unit": "document"}) == ["the cat\r\n\n the mat\n"]
    for name, options, message in (
        (table, {}, "say which field is the text with --text-column"),
        (table, {"text_column": "body"}, r"no field 'body' \(found 'id', 'text'\)"),
        (lines, {"text_column": "text"}, "is plain text and has no fields"),
        (tmp_path, {"text_column": "text"}, "has tables and text files: say with --unit"),
    ):
        with pytest.raises(UsageError, match=message):
            read_texts(str(name), options)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a.txt", "--text-column", "text"], "--text-column says how rows of tables are read"),
        (["a.txt", "-", "--resume"], "--resume cannot go on with stdin"),
        (["a.txt", "--max-line", "0"], "'0' should be a number of bytes"),
        (["a.jsonl", "--text-column", "t", "--output-column", "t"], "are two fields"),
        (["a.jsonl", "--text-column", "x"], "no field 'x' (found 't')"),
    ],
)
def test_options_of_profile_that_mean_nothing(tmp_path, monkeypatch, capsys, model_folders, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "a.jsonl").write_text(json.dumps({"t": "the cat"}) + "\n")
    model = str(model_folders["byte_level_bpe"])
    assert main(["profile", *words, "-m", model, "-o", "p.safetensors"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "p.safetensors").exists()
