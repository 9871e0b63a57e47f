import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.support.folders import make_folder
from tests.support.tiny_tokenizers import TEXT, save_model_folder
from trimserve.cli.main import main
from trimserve.corpus import documents, reader, slices
from trimserve.counting.documents import DocumentCounter
from trimserve.counting.sums import Sums
from trimserve.counting.workers import processes as local
from trimserve.errors import UsageError
from trimserve.files import tensors as tensorfile
from trimserve.model.resolve import resolve_model
from trimserve.profiles.profile import Profile
from trimserve.profiles.profiling import profile
from trimserve.vocab.file import load_vocab

WORDS = "the cat sat on the mat. la latte! " * 40


@pytest.fixture
def here(tmp_path, monkeypatch, model_folders):
    """An empty folder to work in, with a corpus of two files and two models beside it."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    (work / "a.txt").write_text(TEXT, "utf-8")
    (work / "b.jsonl").write_text(json.dumps({"t": WORDS}) + "\n" + json.dumps({"t": "a dog"}) + "\n")
    (work / "model").symlink_to(model_folders["byte_level_bpe"], target_is_directory=True)
    (work / "bert").symlink_to(model_folders["wordpiece"], target_is_directory=True)
    return work


@pytest.fixture
def call(capsys):
    """Run the command line; gives its exit code, stdout and stderr."""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return code, output.out, output.err

    return run


def listing(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_profile_merge_select_with_json(here, call):
    code, out, err = call(
        *("profile", "a.txt", "b.jsonl", "--text-column", "t", "-m", "model", "-o", "p", "--format", "json")
    )
    document = json.loads(out)
    assert (code, err) == (0, "")
    counted = Profile.load("p")
    assert document.keys() >= {"texts", "tokens", "distinct", "vocab_size", "missing_mass", "seconds"}
    assert (document["texts"], document["tokens"]) == (3, counted.tokens)
    assert document["missing_mass"] <= document["missing_mass_bound"]
    again = profile(["a.txt", "b.jsonl"], "model", text_column="t")
    assert np.array_equal(again.counts, counted.counts)

    code, out, _ = call("merge", "p", "p", "-o", "m", "--weight", 1, 3, "--format", "json")
    assert code == 0
    assert json.loads(out)["tokens"] == 2 * counted.tokens

    code, out, _ = call("select", "m", "-o", "v", "--top-k", 300, "--keep-token", "zebra", "--format", "json")
    document = json.loads(out)
    assert code == 0
    vocab = load_vocab(here / "v")
    assert document["kept"] == len(vocab) == 320  # 384 is more than the tokenizer has
    assert document["vocab_size"] == counted.vocab_size
    assert sum(document["reasons"].values()) == document["kept"]
    assert document["coverage"] == pytest.approx(1.0)
    assert vocab.is_kept(resolve_model("model").tokenizer().encode("zebra").ids).all()


def test_a_file_of_lines_that_counts_as_one_document_is_told(here, call, caplog):
    (here / "lines.txt").write_text("where is the cat?\n" * 20, "utf-8")
    (here / "prose.txt").write_text("the cat\nsat on\n\n" * 20, "utf-8")
    (here / "list.md").write_text("- a cat\n" * 20, "utf-8")
    told = "has many lines"
    for corpus, options, expected in (
        (["a.txt", "lines.txt"], [], True),
        (["lines.txt"], ["--unit", "line"], False),
        (["lines.txt"], ["--unit", "document"], False),
        (["prose.txt", "list.md"], [], False),
    ):
        caplog.clear()
        assert call("profile", *corpus, *options, "-m", "model", "-o", "p")[0] == 0
        assert (told in caplog.text) == expected, (corpus, options, caplog.text)


def test_diff_takes_a_trimmed_folder_as_vocab_and_fails_below(here, call):
    assert call("profile", "a.txt", "-m", "model", "-o", "p")[0] == 0
    (here / "other.txt").write_text("zebra! 99%\n", "utf-8")
    assert call("profile", "other.txt", "-m", "model", "-o", "q")[0] == 0
    later = Profile.load("q")
    kept = np.setdiff1d(np.arange(later.vocab_size), np.flatnonzero(later.counts)[:3])
    folder = make_folder(here / "folder", kept, later.vocab_size, source=here / "model")
    code, out, _ = call("diff", "p", "q", "--vocab", "folder", "--format", "json")
    coverages = [Profile.load(name).coverage(folder.vocab.kept_ids) for name in ("p", "q")]
    assert (code, json.loads(out)["coverage"]) == (0, coverages)
    assert coverages[1] < 1
    assert call("diff", "p", "q", "--vocab", "folder", "--fail-below", coverages[1])[0] == 0
    # The later profile counts, not the earlier one.
    between = sum(coverages) / 2
    assert coverages[1] < between < coverages[0]
    assert call("diff", "p", "q", "--vocab", "folder", "--fail-below", between)[0] == 1
    assert call("diff", "p", "q", "--fail-below", 0.9)[0] == 2
    assert call("diff", "p", "q", "--vocab", "folder", "--fail-below", 90)[0] == 2
    (here / "plain").mkdir()
    code, _, err = call("diff", "p", "q", "--vocab", "plain")
    assert (code, "no trimmed one" in err) == (2, True)


def test_advice_does_not_stand_before_an_error(here, call, caplog):
    (here / "lines.txt").write_text("where is the cat?\n" * 20, "utf-8")
    code, _, err = call("profile", "lines.txt", "-m", "nowhere", "-o", "p")
    assert (code, "nowhere" in err, caplog.text) == (2, True, "")


def test_select_finds_the_tokenizer_where_it_is_told(here, call):
    assert call("profile", "a.txt", "-m", "./model", "-o", "p")[0] == 0
    (here / "model").rename(here / "moved")
    code, _, err = call("select", "p", "-o", "v", "--keep-token", "zebra")
    assert (code, "neither a folder nor a hub id" in err) == (2, True)
    assert call("select", "p", "-o", "v", "--keep-token", "zebra", "-m", "moved")[0] == 0
    code, _, err = call("select", "p", "-o", "v", "--keep-token", "zebra", "-m", "bert")
    assert (code, "another tokenizer" in err) == (1, True)


@pytest.mark.usefixtures("here")
def test_summaries_for_people(call):
    code, out, _ = call("profile", "a.txt", "-m", "model", "-o", "p")
    assert code == 0
    for line in (r"^texts +1$", r"^distinct ids +\d+ of 327$", r"^unseen-token rate +\d+\.\d\d % \(at most"):
        assert re.search(line, out, re.MULTILINE), out
    assert "kept ids  of the vocab  coverage" in out
    code, out, _ = call("merge", "p", "-o", "m")
    assert code == 0
    assert re.search(r"^tokens +\d+$", out, re.MULTILINE)
    code, out, _ = call("select", "m", "-o", "v", "--coverage", 0.5)
    assert code == 0
    for line in (
        r"^kept ids +320 of 327 \(97\.86 %\)$",
        r"^  structural +\d+$",
        r"^coverage +100\.00 % of the",
    ):
        assert re.search(line, out, re.MULTILINE), out


def test_bytes_of_rows_are_shown_where_weights_are_at_hand(tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_model_folder("wordpiece", tmp_path / "model")
    save_file({"embed_tokens.weight": np.zeros((37, 8), np.float32)}, "model/model.safetensors")
    (tmp_path / "a.txt").write_text(WORDS)
    assert call("profile", "a.txt", "-m", "model", "-o", "p")[0] == 0
    code, out, _ = call("select", "p", "-o", "v", "--format", "json")
    document = json.loads(out)
    assert (code, document["bytes_kept"], document["bytes_before"]) == (0, 37 * 32, 37 * 32)
    assert "1.18 kB of 1.18 kB" in call("select", "p", "-o", "v")[1]
    code, _, err = call("select", "p", "-o", "v", "--max-bytes", 640)
    assert code == 2
    assert "max_bytes 640 cannot hold" in err


def test_stdin_is_a_corpus(here, call, monkeypatch):
    class Stdin:
        buffer = io.BytesIO((here / "a.txt").read_bytes())

    monkeypatch.setattr(sys, "stdin", Stdin)
    assert call("profile", "-", "-m", "model", "-o", "s")[0] == 0
    assert call("profile", "a.txt", "-m", "model", "-o", "f")[0] == 0
    assert np.array_equal(Profile.load("s").counts, Profile.load("f").counts)
    assert Profile.load("s").sources[0].name == "stdin"
    assert Profile.load("s").sources[0].sha256 == Profile.load("f").sources[0].sha256


def test_corpus_without_newlines_is_warned_about(here, call, caplog):
    (here / "line.txt").write_text("one line")
    code, out, _ = call("profile", "line.txt", "-m", "model", "-o", "p", "--format", "json")
    assert code == 0
    assert json.loads(out)["texts"] == 1
    assert "no newline token was counted" in caplog.text


BAD = [
    (["profile", "a.txt", "-m", "model"], 2, "-o/--output"),
    (["profile", "-m", "model", "-o", "p"], 2, "CORPUS"),
    (["profile", "none.txt", "-m", "model", "-o", "p"], 2, "none.txt does not exist"),
    (["profile", "b.jsonl", "-m", "model", "-o", "p"], 2, "--text-column"),
    (["profile", "b.jsonl", "--text-column", "x", "-m", "model", "-o", "p"], 2, "line 1: no field 'x'"),
    (["profile", "bad.txt", "-m", "model", "-o", "p"], 2, "bad.txt, line 2: byte 0xff is not UTF-8"),
    (["profile", "empty.txt", "-m", "model", "-o", "p"], 2, "holds no text"),
    (["profile", "a.txt", "-m", "nowhere/at/all", "-o", "p"], 2, "neither a folder nor a hub id"),
    (["profile", "a.txt", "-m", "bare", "-o", "p"], 2, "has no tokenizer.json"),
    (["profile", "a.txt", "-m", "model", "-o", "no/p"], 2, "the folder no does not exist"),
    (["profile", "a.txt", "-m", "model", "-o", "a.txt"], 2, "a.txt exists and is not a profile file"),
    (["profile", "a.txt", "-m", "model", "-o", "."], 2, "exists and is not a profile file"),
    (["profile", "a.txt", "-m", "model", "-o", "p", "--workers", "0"], 2, "workers should be from 1 to 1024"),
    (["merge", "none", "-o", "m"], 2, "none does not exist"),
    (["merge", "good", "a.txt", "-o", "m"], 1, "a.txt is not a safetensors file"),
    (["merge", "good", "other", "-o", "m"], 1, "different tokenizers"),
    (["merge", "good", "good", "-o", "m", "--weight", "1"], 2, "2 profiles need 2 weights"),
    (["merge", "good", "cut", "-o", "m"], 1, "cut off"),
    (["merge", "good", "future", "-o", "m"], 1, "schema 9, this trimserve reads 1"),
    (["select", "good", "-o", "v", "--coverage", "1.5"], 2, "from 0 to 1"),
    (["select", "good", "-o", "v", "--coverage", ".9", "--top-k", "9"], 2, "not allowed with"),
    (["select", "good", "-o", "v", "--top-k", "3"], 2, "less than the"),
    (["select", "good", "-o", "v", "--max-bytes", "9"], 2, "held no weights"),
    (["select", "good", "-o", "good"], 2, "not a vocab file"),
    (["select", "good", "-o", "v", "--keep-file", "none.txt"], 2, "none.txt does not exist"),
    (["select", "good", "other", "-o", "v"], 1, "different tokenizers"),
]


@pytest.mark.parametrize(("arguments", "code", "message"), BAD, ids=lambda value: str(value)[:60])
def test_bad_input_is_one_sentence_and_changes_nothing(here, call, arguments, code, message):
    (here / "bad.txt").write_bytes(b"one\ntwo \xff\n")
    (here / "empty.txt").write_bytes(b"")
    (here / "bare").mkdir()
    profile("a.txt", "model").save("good")
    profile("a.txt", "bert").save("other")
    content = (here / "good").read_bytes()
    (here / "cut").write_bytes(content[: len(content) // 2])
    (here / "future").write_bytes(content.replace(b'"schema_version":"1"', b'"schema_version":"9"'))
    before = listing(here)
    found, out, err = call(*arguments)
    assert (found, out) == (code, "")
    assert message in err
    assert "Traceback" not in err
    if not err.startswith("usage:"):  # argparse's own
        assert re.fullmatch(r"trimserve: .+\n", err), err
    assert listing(here) == before


@pytest.mark.parametrize("where", ["counting", "writing"])
def test_ctrl_c_before_anything_is_counted_leaves_nothing(here, call, monkeypatch, where):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    if where == "counting":
        monkeypatch.setattr(DocumentCounter, "add", interrupted)
    else:
        monkeypatch.setattr(tensorfile.os, "write", interrupted)
    before = listing(here)
    code, out, err = call("profile", "a.txt", "-m", "model", "-o", "p")
    assert (code, out, err) == (130, "", "trimserve: interrupted; no file was written.\n")
    assert listing(here) == before


@pytest.fixture
def small_slices(monkeypatch):
    """Slices of 2 kB, so that a small corpus has many."""
    monkeypatch.setattr(slices, "SLICE_BYTES", 2_000)
    monkeypatch.setattr(documents, "MAX_CHARACTERS", 1_000)


@pytest.fixture
def interrupt_after(monkeypatch):
    """Let Ctrl-C come when so many slices are done."""

    def arrange(count):
        add = Sums.add
        left = [count]

        def adding(self, *block):
            add(self, *block)
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt

        monkeypatch.setattr(Sums, "add", adding)

    return arrange


@pytest.mark.usefixtures("small_slices")
def test_a_bad_row_in_a_late_slice_writes_nothing(here, call):
    rows = [json.dumps({"t": f"a cat {i} sat"}) for i in range(300)]
    arguments = ("profile", "rows.jsonl", "--text-column", "t", "-m", "model", "-o", "p")
    (here / "rows.jsonl").write_text("\n".join([*rows, "{broken"]), "utf-8")
    code, out, err = call(*arguments)
    assert (code, out, (here / "p").exists()) == (2, "", False)
    assert "line 301" in err
    assert call(*arguments, "--skip-bad")[0] == 0
    older = (here / "p").read_bytes()
    assert call(*arguments)[0] == 2
    assert (here / "p").read_bytes() == older


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("done", [1, 4, 7])
def test_ctrl_c_keeps_what_was_counted_and_resume_goes_on(here, call, interrupt_after, done):
    (here / "long.txt").write_text(f"{TEXT}the cat é sat <think>\n" * 30, "utf-8")
    (here / "rows.jsonl").write_text("".join(json.dumps({"t": f"a cat {i} sat"}) + "\n" for i in range(300)))
    arguments = ("profile", "long.txt", "rows.jsonl", "--text-column", "t", "-m", "model", "-o")
    assert call(*arguments, "whole")[0] == 0
    interrupt_after(done)
    code, out, err = call(*arguments, "p")
    assert (code, out) == (130, "")
    assert re.fullmatch(r"trimserve: interrupted; p holds what was counted, .* go on with --resume\.\n", err)
    partial, whole = Profile.load("p"), Profile.load("whole")
    assert 0 < partial.tokens < whole.tokens
    assert call("select", "p", "-o", "v")[0] == 0  # a valid profile
    code, _, err = call("profile", "rows.jsonl", "--text-column", "t", "-m", "model", "-o", "p", "--resume")
    assert (code, "part of a count of other files" in err) == (2, True)
    code, _, err = call(*arguments, "p", "--resume", "-m", "bert")
    assert (code, "another tokenizer" in err) == (1, True)
    assert call(*arguments, "p", "--resume")[0] == 0
    resumed = Profile.load("p")
    for name in ("counts", "document_counts", "texts", "characters", "beyond_rows", "unfinished"):
        assert np.array_equal(getattr(resumed, name), getattr(whole, name)), name
    assert sorted(map(str, resumed.sources)) == sorted(map(str, whole.sources))
    code, _, err = call(*arguments, "p", "--resume")
    assert (code, "nothing left to count" in err) == (2, True)


@pytest.mark.usefixtures("small_slices", "here")
def test_shards_add_up_to_the_whole(here, call, caplog):
    (here / "long.txt").write_text(f"{TEXT}the cat sat\n" * 20, "utf-8")
    (here / "rows.jsonl").write_text("".join(json.dumps({"t": f"a cat {i}"}) + "\n" for i in range(500)))
    arguments = ("profile", "long.txt", "rows.jsonl", "a.txt", "--text-column", "t", "-m", "model", "-o")
    assert call(*arguments, "whole")[0] == 0
    for number in (1, 2, 3):
        assert call(*arguments, f"p{number}", "--shard", f"{number}/3")[0] == 0
    assert call("merge", "p1", "p2", "p3", "-o", "m")[0] == 0
    assert "counted more than once" not in caplog.text
    merged, whole = Profile.load("m"), Profile.load("whole")
    for name in ("counts", "document_counts", "texts", "characters", "effective_tokens"):
        assert np.array_equal(getattr(merged, name), getattr(whole, name)), name
    assert sum(source.bytes for source in merged.sources) == sum(source.bytes for source in whole.sources)
    for shard in ("0/3", "4/3", "x", "1"):
        code, _, err = call(*arguments, "p", "--shard", shard)
        assert (code, "from 1/N to N/N" in err) == (2, True)
    code, _, err = call("profile", "-", "-m", "model", "-o", "p", "--shard", "1/2")
    assert (code, "cannot be shared out" in err) == (2, True)


@pytest.mark.usefixtures("small_slices")
def test_lines_are_numbered_for_messages_only(here, call, monkeypatch):
    """A slice would have to read all of the file before it, for every row."""
    monkeypatch.setattr(reader, "_places", lambda *_: lambda line: pytest.fail(f"numbered line {line}"))
    rows = [json.dumps({"t": f"a cat {i} é"}, ensure_ascii=i % 2 == 0) + "\n" for i in range(400)]
    (here / "rows.jsonl").write_text("".join(rows), "utf-8")
    (here / "lines.txt").write_text("the cat sat\n" * 800, "utf-8")
    assert call("profile", "rows.jsonl", "--text-column", "t", "-m", "bert", "-o", "rows")[0] == 0
    assert call("profile", "lines.txt", "-m", "bert", "-o", "lines")[0] == 0
    assert (Profile.load("rows").texts, Profile.load("lines").texts) == (400, 1)


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize("engine", ["words", "tokenizers"])
def test_processes_count_like_one(here, call, monkeypatch, engine):
    (here / "rows.jsonl").write_text("".join(json.dumps({"t": f"a cat {i} é"}) + "\n" for i in range(400)))
    arguments = ("profile", "rows.jsonl", "--text-column", "t", "-m", "bert", "--workers", "2", "-o")
    assert call(*arguments, "one")[0] == 0
    monkeypatch.setattr(local, "BYTES_A_PROCESS", dict.fromkeys(local.BYTES_A_PROCESS, 1_000))
    started = []
    start = local._Process.__init__
    monkeypatch.setattr(
        local._Process, "__init__", lambda self, job: (started.append(job), start(self, job))[1]
    )
    if engine == "tokenizers":
        monkeypatch.setattr("trimserve.counting.encoding.words.find_joint", refuse)
    assert call(*arguments, "two")[0] == 0
    assert [job.engine for job in started] == [engine] * 2
    one, two = Profile.load("one"), Profile.load("two")
    for name in ("counts", "document_counts", "texts", "characters", "sources"):
        assert np.array_equal(getattr(one, name), getattr(two, name)), name
    with (here / "rows.jsonl").open("a") as file:
        file.write("{\n")
    code, _, err = call(*arguments, "two")
    assert (code, "rows.jsonl, line 401: broken JSON" in err) == (2, True)
    (here / "rows.jsonl").write_text("".join(json.dumps({"t": "a cat"}) + "\n" for _ in range(400)))
    monkeypatch.setattr(local, "_WORKER", "no_such_module")
    code, _, err = call(*arguments, "two")
    assert (code, "a worker process ended" in err) == (1, True)


def refuse(*_):
    raise UsageError("not proven")


def test_chat_and_output_columns_are_counted_apart(here, call):
    messages = [{"role": "user", "content": "a cat?"}, {"role": "assistant", "content": "the dog"}]
    (here / "chat.jsonl").write_text(json.dumps({"messages": messages, "p": "a cat?", "c": "dog"}) + "\n")
    code, out, _ = call("profile", "chat.jsonl", "--chat", "-m", "model", "-o", "p", "--format", "json")
    tokenizer, counted = resolve_model("model").tokenizer(), Profile.load("p")
    prompt, answer = "<|turn|>user\na cat?<|end|>\n<|turn|>assistant\n", "the dog<|end|>\n"
    expected = np.bincount(tokenizer.encode(prompt + answer).ids, minlength=counted.vocab_size)
    completion = tokenizer.encode(answer).ids
    assert code == 0
    assert np.array_equal(counted.counts, expected)
    assert np.array_equal(counted.output_counts, np.bincount(completion, minlength=counted.vocab_size))
    assert json.loads(out)["output_tokens"] == len(completion)
    columns = ("--text-column", "p", "--output-column", "c")
    code, out, _ = call("profile", "chat.jsonl", *columns, "-m", "model", "-o", "p")
    counted = Profile.load("p")
    assert (code, counted.texts) == (0, 1)
    assert f"tokens of completions: {len(tokenizer.encode('dog').ids)}\n" in out
    assert counted.tokens == len(tokenizer.encode("a cat?").ids) + len(tokenizer.encode("dog").ids)


def test_bad_rows_are_reported(here, call):
    (here / "bad.jsonl").write_text('{"t": "a cat"}\n{\n{"t": ""}\n')
    arguments = ("profile", "bad.jsonl", "--text-column", "t", "-m", "model", "-o", "p")
    code, _, err = call(*arguments)
    assert (code, "bad.jsonl, line 2: broken JSON" in err, "--skip-bad" in err) == (2, True, True)
    code, out, _ = call(*arguments, "--skip-bad", "--format", "json")
    assert (code, json.loads(out)["skipped"]) == (0, {"broken": 1, "empty": 1})
    assert "left out: 1 broken, 1 empty\n" in call(*arguments, "--skip-bad")[1]
    assert Profile.load("p").skipped == {"broken": 1, "empty": 1}


def test_full_disk_is_one_sentence_and_leaves_nothing(here, call, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tensorfile.os, "write", full)
    before = listing(here)
    code, out, err = call("profile", "a.txt", "-m", "model", "-o", "p")
    assert (code, out) == (1, "")
    assert err == "trimserve: No space left on device: p. Free some space and run it again.\n"
    assert listing(here) == before


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_real_ctrl_c_in_a_fresh_process(here):
    command = [sys.executable, "-m", "trimserve", "profile", "-", "-m", "model", "-o", "p"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731 - a background job ignores it
    running = subprocess.Popen(command, preexec_fn=heed, **pipes)
    running.stdin.write(b"a cat and a dog\n" * 400_000)  # returns once most of it was read
    running.stdin.flush()
    time.sleep(0.5)  # it counts, or waits for more
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (130, b"")
    assert re.fullmatch(
        rb"trimserve: interrupted; (no file was written|p holds .* stdin cannot be resumed)\.\n", err
    )
    if b"holds" in err:
        counted = Profile.load("p")
        unit = profile((), "model", texts=["a cat and a dog\n" * 1000], progress=False)
        assert counted.tokens == pytest.approx(unit.tokens * counted.characters / unit.characters, rel=1e-3)
    else:
        assert sorted(listing(here)) == ["a.txt", "b.jsonl"]


@pytest.mark.usefixtures("here")
def test_console_script_in_a_fresh_process():
    command = [sys.executable, "-m", "trimserve", "profile", "a.txt", "-m", "model", "-o", "p"]
    done = subprocess.run([*command, "--format", "json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["texts"] == 1
    assert done.stderr == ""  # no bar: stderr is not a terminal
