"""The benchmarks' own arithmetic, parsing and refusals; their timing decides nothing here."""

import importlib.util
import json
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from bench import harness, machine, suite
from bench.peers import worker as peer_worker

pytest.importorskip("onnx")
pytest.importorskip("ml_dtypes")

from bench import paper, quality, scale
from bench.encoder import models as encoder_models


def word_tokenizer(words):
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0} | {w: i for i, w in enumerate(words, 1)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@pytest.mark.parametrize("available", [True, False])
def test_device_cuda_is_taken_only_where_onnxruntime_has_it(available, monkeypatch, capsys):
    runtime = pytest.importorskip("onnxruntime")
    providers = ["CUDAExecutionProvider"] * available + ["CPUExecutionProvider"]
    monkeypatch.setattr(runtime, "get_available_providers", lambda: providers)
    parser = harness.parser("what is measured", rounds=1)
    if available:
        assert parser.parse_args(["--device", "cuda"]).device == "cuda"
        return
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(["--device", "cuda"])
    assert stop.value.code == 2
    assert "pip install 'trimserve[gpu]'" in capsys.readouterr().err


def test_rows_of_a_gpu_name_it_and_its_driver(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text(
        f"#!{sys.executable}\nimport sys\n"
        "print('41, 100\\n42, 512' if 'compute-apps' in sys.argv[1] else 'Some GPU, 555.1, 80 MiB')\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.gpu() == {"name": "Some GPU", "driver_version": "555.1", "memory.total": "80 MiB"}
    assert machine.device_memory(42) == 512 << 20
    assert machine.device_memory(7) is None
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert machine.gpu() is None


def test_bandwidth_is_a_plausible_number_of_bytes_a_second():
    assert 1e7 < harness.bandwidth(2, copy_bytes=16 << 20) < 1e13


def test_newest_row_of_each_combination(tmp_path):
    rows = [{"model": "a", "n": 1}, {"model": "b", "n": 2}, {"model": "a", "n": 3}]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    assert [row["n"] for row in harness.newest_rows("some", "model", folder=tmp_path)] == [3, 2]


def test_published_rows_and_parameters_agree_with_the_shapes():
    """Rows removed in percent give the published parameters through V, H and the size of each model."""
    for row in paper.PUBLISHED.values():
        for name, (rows, parameters) in row.items():
            model = paper.MODELS[name]
            kept = round(model.vocab_size * (1 - rows / 100))
            found = paper._removed(model, model.vocab_size, kept)
            # Both are printed with two decimals: each may be off by half of the last.
            printed = 0.005 + 0.005 * found["parameters_removed"] / found["rows_removed"]
            assert found["parameters_removed"] == pytest.approx(parameters, abs=printed), name


def test_seen_once_loses_held_out_tokens_and_coverage_keeps_them_cold(tmp_path):
    folder = tmp_path / "words"
    folder.mkdir()
    word_tokenizer(["cat", "dog", "hen", "pig"]).save(str(folder / "tokenizer.json"))
    row = paper.measure("bert-base-cased", "words", folder, (["cat cat dog"], ["cat hen"]))
    assert row["seen_once"]["kept"] == 2
    assert row["seen_once_all_splits"]["kept"] == 3
    assert row["seen_once"]["held_out_missing"] == pytest.approx(0.5)


def test_fit_finds_the_law_that_made_the_points():
    law = scale.Law(2e-4, 3e-10, 5e-12, 0.0)
    points = [
        {"rows": n, "width": h, "states": s, "ms": 1e3 * law.seconds(n * h, s)}
        for n in (4096, 65_536)
        for h in (64, 640)
        for s in (1, 16)
    ]
    found = scale.fit(points)
    assert (found.a, found.b, found.c) == pytest.approx((law.a, law.b, law.c), rel=1e-6)
    assert found.error < 1e-6


def test_fit_never_gives_a_negative_cost():
    points = [{"rows": n, "width": 8, "states": 1, "ms": max(0.1, n - 5000)} for n in (4096, 8192, 16_384)]
    found = scale.fit(points)
    assert min(found.a, found.b, found.c) >= 0


def test_simulation_by_bytes_alone_is_the_prize():
    shape = scale.Shape(1000, 10, active=50_000, total=50_000, tied=True)
    found = scale.simulate(scale.Law(0.0, 1.0, 0.0, 0.0), shape, kept=100)
    assert found["compact"] == pytest.approx(50_000 / (40_000 + 1000))
    assert found["vocab_share"] == pytest.approx(0.2)
    assert found["exact"] == pytest.approx(found["exact_by_bandwidth"])
    assert found["compact"] > found["exact"] > 1


def test_held_out_chunks_are_not_profiled(tmp_path):
    lines = [f"line {number}\n" for number in range(1000)]
    (tmp_path / "corpus.txt").write_text("".join(lines), "utf-8")
    profiled, held_out = quality.split(tmp_path / "corpus.txt")
    assert len(profiled.splitlines()) + sum(len(chunk.splitlines()) for chunk in held_out) == 1000
    assert not set(profiled.splitlines()) & {line for chunk in held_out for line in chunk.splitlines()}
    assert len(held_out) == 5


@pytest.mark.parametrize(
    ("one", "other", "share"), [("abcd", "abxd", 0.5), ("ab", "abc", 1.0), ("", "x", 1.0), ("abc", "", 0.0)]
)
def test_agreement_ends_at_the_first_difference(one, other, share):
    assert quality.common(one, other) == pytest.approx(share)


def test_texts_have_the_wanted_number_of_tokens():
    words = [f"w{number}" for number in range(50)]
    corpus = " ".join(np.random.default_rng(0).choice(words, 400))
    texts = encoder_models.texts_of_length(word_tokenizer(words), corpus, 16, 8)
    assert len(texts) == 8
    assert [len(text.split()) for text in texts] == [16] * 8


def test_a_tool_is_timed_without_its_first_token():
    def tool(prompt):
        yield from range(prompt[0], prompt[0] + 100)

    found = peer_worker.generate(tool, [5], 4)
    assert found["ids"] == [5, 6, 7, 8]
    assert found["ms"] >= 0
    assert found["first_ms"] >= 0


def test_suite_names_modules_that_exist_and_fits_an_hour():
    for entry in suite.SUITE:
        assert importlib.util.find_spec(f"bench.{entry.module}"), entry.module
    assert sum(entry.minutes for entry in suite.SUITE) <= 60
    words = suite.command(suite.SUITE[0], quick=True, device="cuda")
    assert words[1:] == ["-m", f"bench.{suite.SUITE[0].module}", "--quick", "--device", "cuda"]
