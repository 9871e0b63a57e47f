"""`bench.paper --glue`: tiny files made here in the format of GLUE's own archives, with their oddities."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

pytest.importorskip("onnxruntime")

from bench import harness, paper

# Task -> file -> header (CoLA's labelled files have none) and lines. Words are in no other column.
FILES = {
    "CoLA": {
        "train.tsv": (None, ["gj04\t1\t\talpha beta", "gj04\t0\t*\tbeta ''gamma"]),
        "dev.tsv": (None, ["gj04\t1\t\tdelta"]),
        "test.tsv": ("index\tsentence", ["0\tepsilon"]),
    },
    "SST-2": {
        "train.tsv": ("sentence\tlabel", ['alpha "beta \t1']),
        "test.tsv": ("index\tsentence", ["0\tgamma"]),
    },
    "MRPC": {
        "train.tsv": ("\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", ["1\t7\t8\talpha\tbeta"]),
        "test.tsv": ("index\t#1 ID\t#2 ID\t#1 String\t#2 String", ["0\t7\t8\tgamma\tdelta"]),
    },
    "QQP": {
        "train.tsv": (
            "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
            ["0\t1\t2\talpha\tbeta\t0", "1\t3\t4\tgamma"],  # one of QQP's cut-off lines
        ),
        "test.tsv": ("id\tquestion1\tquestion2", ["0\tdelta\tepsilon"]),
    },
    "STS-B": {
        "train.tsv": (
            "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
            ["0\tnews\tM\t2012\t1\tnone\tnone\talpha\tbeta\t5.000"],
        )
    },
    "MNLI": {
        "train.tsv": (
            "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
            "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
            ["0\t1\t1n\tg\t( a )\t( b )\t(R a)\t(R b)\talpha\tbeta\tneutral\tneutral"],
        ),
        "dev_matched.tsv": ("index\tsentence1\tsentence2\tlabel1\tgold_label", ["0\tgamma\tdelta\tx\tx"]),
        "test_mismatched.tsv": ("index\tsentence1\tsentence2", ["0\tepsilon\tzeta"]),
    },
    "QNLI": {"train.tsv": ("index\tquestion\tsentence\tlabel", ["0\talpha\tbeta\tentailment"])},
    "RTE": {"dev.tsv": ("index\tsentence1\tsentence2\tlabel", ["0\talpha\tbeta\tentailment"])},
    "WNLI": {"test.tsv": ("index\tsentence1\tsentence2", ["0\talpha\tbeta"])},
}
TEXTS = {
    "CoLA": (["alpha beta", "beta ''gamma"], ["delta", "epsilon"]),
    "SST-2": (['alpha "beta '], ["gamma"]),
    "MRPC": (["alpha", "beta"], ["gamma", "delta"]),
    "QQP": (["alpha", "beta", "gamma"], ["delta", "epsilon"]),
    "STS-B": (["alpha", "beta"], []),
    "MNLI": (["alpha", "beta"], ["gamma", "delta", "epsilon", "zeta"]),
    "QNLI": (["alpha", "beta"], []),
    "RTE": ([], ["alpha", "beta"]),
    "WNLI": ([], ["alpha", "beta"]),
}


@pytest.fixture
def glue(tmp_path):
    for task, files in FILES.items():
        folder = tmp_path / "GLUE" / task
        folder.mkdir(parents=True)
        for name, (header, lines) in files.items():
            text = "\n".join([*([header] if header else []), *lines]) + "\n"
            (folder / name).write_text(text, "utf-8", newline="\n")
    return tmp_path / "GLUE"


@pytest.mark.parametrize("task", FILES)
def test_texts_of_every_task_are_read_by_its_columns(glue, task):
    assert set(FILES) == set(paper.PUBLISHED)
    assert paper.glue_texts(glue, task) == TEXTS[task]


def test_a_file_of_another_task_is_refused(glue):
    (glue / "RTE" / "train.tsv").write_text("index\tother\n0\tone\n", "utf-8")
    with pytest.raises(SystemExit, match="has no column sentence1"):
        paper.glue_texts(glue, "RTE")


def test_glue_rows_stand_beside_the_published_ones(glue, monkeypatch, tmp_path, capsys):
    words = ["[UNK]", "alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
    tokenizer = Tokenizer(models.WordLevel({word: id_ for id_, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for name in paper.MODELS:
        (tmp_path / "tokenizers" / name).mkdir(parents=True)
        tokenizer.save(str(tmp_path / "tokenizers" / name / "tokenizer.json"))
    for task in set(FILES) - {"MRPC", "MNLI"}:
        for file in (glue / task).iterdir():
            file.unlink()
        (glue / task).rmdir()
    monkeypatch.setattr(harness, "SCRATCH", tmp_path / "rows")
    arguments = ["--quick", "--glue", str(glue), "--tokenizers", str(tmp_path / "tokenizers")]
    monkeypatch.setattr("sys.argv", ["paper", *arguments])
    assert paper.main() == 0
    rows = harness.last_row("paper", tmp_path / "rows")["rows"]
    assert [(row["data"], row["model"], row["note"]) for row in rows] == [
        (task, model, "its own") for task in ("MNLI", "MRPC") for model in paper.MODELS
    ]
    mrpc = rows[3]
    assert mrpc["published"] == list(paper.PUBLISHED["MRPC"]["bert-base-cased"])
    assert mrpc["seen_once"]["kept"] == 2
    assert mrpc["seen_once_all_splits"]["kept"] == 4
    assert mrpc["seen_once"]["held_out_missing"] == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"][3]["data"] == "MRPC"


def test_a_folder_without_glue_is_a_usage_error(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("sys.argv", ["paper", "--glue", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        paper.main()
    assert stop.value.code == 2
    assert "holds none of CoLA" in capsys.readouterr().err
