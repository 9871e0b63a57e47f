"""verify: true of what export makes, and false as soon as one row, byte or number of it is wrong."""

import dataclasses
import json
import platform
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import onnx_ir as ir
import torch

from tests.support.models import FAMILIES, save_model
from trimserve.cli.main import main
from trimserve.files.hashes import sha256_file
from trimserve.files.tensors import read_header
from trimserve.folder.manifest import read_manifest, write_manifest
from trimserve.folder.names import COLD_NAME, VOCAB_NAME
from trimserve.folder.opening import list_files, open_folder
from trimserve.model.resolve import resolve_model
from trimserve.model.structural import structural_ids
from trimserve.vocab.file import save_vocab
from trimserve.vocab.map import VocabMap
from trimserve_export import export
from trimserve_export.verify import verify

pytestmark = pytest.mark.export


def every_other_id(model: Path) -> VocabMap:
    """Structural ids and every other id, so that each text has kept and cold ids."""
    source = resolve_model(model)
    size = source.vocab_size
    kept = np.union1d(structural_ids(source), np.arange(0, size, 2)).astype(np.int32)
    return VocabMap(kept, np.zeros(len(kept), np.uint8), size, source.tokenizer_sha256)


def make(family: str, folder: Path, *, stored=torch.float32, **options) -> tuple[Path, Path]:
    """Make a model of a family and its trimmed folder."""
    kind = "byte_level_bpe" if FAMILIES[family].task.startswith("text-generation") else "wordpiece"
    model = save_model(family, folder / "model", tokenizer=kind, dtype=stored)
    export(model, every_other_id(model), folder / "trimmed", task=FAMILIES[family].task, **options)
    return model, folder / "trimmed"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Model and trimmed folder by family; each is made once and must not be changed."""
    cache: dict[str, tuple[Path, Path]] = {}

    def get(family: str) -> tuple[Path, Path]:
        if family not in cache:
            cache[family] = make(family, tmp_path_factory.mktemp(family))
        return cache[family]

    return get


@pytest.fixture
def copied(made, tmp_path):
    """The same, with a trimmed folder that the test may damage."""

    def get(family: str) -> tuple[Path, Path]:
        model, trimmed = made(family)
        return model, Path(shutil.copytree(trimmed, tmp_path / "trimmed"))

    return get


def rehash(folder: Path) -> None:
    """Make the manifest agree with the files, so that hashes cannot tell that they were changed."""
    manifest = dataclasses.replace(read_manifest(folder), files=list_files(folder))
    write_manifest(folder, manifest)


def flip_byte(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x40]))


def weight_offset(folder: Path, shape: tuple[int, int], row: int, axis: int) -> int:
    """Offset in the external data of one entry of a row of the only weight of a shape."""
    weights = ir.load(folder / "model.onnx").graph.initializers.values()
    (tensor,) = [weight.const_value for weight in weights if tuple(weight.shape.numpy()) == shape]
    index = row * shape[1] if axis == 0 else row
    return tensor.offset + 4 * index + 3  # the byte with the sign and most of the exponent


@pytest.mark.parametrize("family", FAMILIES)
def test_what_export_makes_is_verified_bit_for_bit(made, family):
    model, trimmed = made(family)
    result = verify(trimmed, model, store=False)
    assert result.ok, result.failed
    names = [check.name for check in result.checks]
    expected = ["files", "tokenizer", "kept-rows", "hidden-states"]
    expected += ["kept-logits"] if FAMILIES[family].task in ("fill-mask", "text-generation-with-past") else []
    expected += ["cold-slots"]
    expected += [
        "generated-ids" if FAMILIES[family].task == "text-generation-with-past" else "runtime-outputs"
    ]
    assert names == [*expected, "source"]
    assert [
        check.max_abs_diff for check in result.checks if check.name in ("hidden-states", "cold-slots")
    ] == [0, 0]


@pytest.mark.parametrize("family", ["bert_encoder", "llama", "llama_tied", "bert"])
def test_one_wrong_embedding_row_is_found(copied, family):
    model, trimmed = copied(family)
    kept = open_folder(trimmed).vocab.kept_ids
    row = len(kept) // 2
    flip_byte(trimmed / "model.onnx_data", weight_offset(trimmed, (len(kept), 16), row, axis=0))
    rehash(trimmed)
    result = verify(trimmed, model, store=False)
    assert "kept-rows" in result.failed
    assert f"token id {kept[row]:,}" in next(
        check.detail for check in result.checks if check.name == "kept-rows"
    )


def test_wrong_embedding_rows_are_found_by_the_numbers_alone(copied):
    model, trimmed = copied("bert_encoder")
    kept = open_folder(trimmed).vocab.kept_ids
    for row in range(len(kept)):
        flip_byte(trimmed / "model.onnx_data", weight_offset(trimmed, (len(kept), 16), row, axis=0))
    rehash(trimmed)
    assert {"kept-rows", "hidden-states", "cold-slots"} <= set(verify(trimmed, model, store=False).failed)


def test_one_wrong_head_row_is_found(copied):
    model, trimmed = copied("llama")
    kept = open_folder(trimmed).vocab.kept_ids
    row = len(kept) // 3
    flip_byte(trimmed / "model.onnx_data", weight_offset(trimmed, (16, len(kept)), row, axis=1))
    rehash(trimmed)
    failed = verify(trimmed, model, store=False).failed
    assert {"kept-rows", "kept-logits"} <= set(failed)
    assert "hidden-states" not in failed


@pytest.mark.parametrize(
    ("family", "tensor"), [("bert_encoder", "embedding"), ("phi", "head"), ("phi", "head_bias")]
)
def test_one_wrong_cold_row_is_found(copied, family, tensor):
    model, trimmed = copied(family)
    spec = read_header(trimmed / COLD_NAME)[0][tensor]
    flip_byte(trimmed / COLD_NAME, spec.offset + spec.nbytes // 2 + 3)
    rehash(trimmed)
    result = verify(trimmed, model, store=False)
    assert "kept-rows" in result.failed
    assert COLD_NAME in next(check.detail for check in result.checks if check.name == "kept-rows")


def test_all_cold_embedding_rows_wrong_is_found_by_the_numbers_alone(copied):
    model, trimmed = copied("bert_encoder")
    spec = read_header(trimmed / COLD_NAME)[0]["embedding"]
    for row in range(spec.shape[0]):
        flip_byte(trimmed / COLD_NAME, spec.offset + row * 64 + 3)
    rehash(trimmed)
    assert {"kept-rows", "cold-slots"} <= set(verify(trimmed, model, store=False).failed)


def test_another_tokenizer_is_found_although_every_hash_was_renewed(copied):
    model, trimmed = copied("bert_encoder")
    path = trimmed / "tokenizer.json"
    path.write_bytes(path.read_bytes() + b"\n")
    digest = sha256_file(path)
    vocab = dataclasses.replace(open_vocab(trimmed), tokenizer_sha256=digest)
    save_vocab(vocab, trimmed / VOCAB_NAME)
    write_manifest(trimmed, dataclasses.replace(read_manifest(trimmed), tokenizer_sha256=digest))
    rehash(trimmed)
    assert verify(trimmed, model, store=False).failed == ("tokenizer",)


def open_vocab(folder: Path) -> VocabMap:
    from trimserve.vocab.file import load_vocab

    return load_vocab(folder / VOCAB_NAME)


def test_another_model_of_the_same_shape_is_found(made, tmp_path):
    _, trimmed = made("bert_encoder")
    other = save_model("bert_encoder", tmp_path / "other", seed=1)
    failed = verify(trimmed, other, store=False).failed
    assert {"files", "kept-rows", "hidden-states", "cold-slots"} <= set(failed)


def test_changed_file_is_found_by_its_hash(copied):
    model, trimmed = copied("bert_encoder")
    flip_byte(trimmed / "config.json", 1)
    result = verify(trimmed, model)
    assert result.failed == ("files",)
    assert "config.json" in result.checks[0].detail


def test_folder_without_cold_rows_is_verified_on_texts_it_can_be_fed(tmp_path):
    model, trimmed = make("bert_encoder", tmp_path, cold=False)
    result = verify(trimmed, model, texts=["the cat sat on the mat", "a dog"], store=False)
    assert "cold-slots" not in [check.name for check in result.checks]
    assert result.ok, result.checks


def test_trimmed_checkpoint_is_verified_by_its_rows(tmp_path):
    model, trimmed = make("phi", tmp_path, to="safetensors")
    result = verify(trimmed, model)
    assert [check.name for check in result.checks] == ["files", "tokenizer", "kept-rows"]
    assert result.ok, result.checks
    spec = read_header(trimmed / "model.safetensors")[0]["lm_head.weight"]
    flip_byte(trimmed / "model.safetensors", spec.offset + 3)
    rehash(trimmed)
    assert verify(trimmed, model).failed == ("kept-rows",)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_rows_of_half_precision_checkpoints_are_compared_exactly(tmp_path, stored, dtype):
    model, trimmed = make("bert_encoder", tmp_path, stored=stored, dtype=dtype)
    result = verify(trimmed, model)
    assert result.ok, result.checks


def test_command_exits_with_3_and_names_the_failed_check(copied, capsys):
    model, trimmed = copied("bert_encoder")
    assert main(["verify", str(trimmed), "-m", str(model), "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is True
    assert {"name", "ok", "max_abs_diff", "detail"} <= document["checks"][0].keys()

    spec = read_header(trimmed / COLD_NAME)[0]["embedding"]
    flip_byte(trimmed / COLD_NAME, spec.offset + 3)
    rehash(trimmed)
    assert main(["verify", str(trimmed), "-m", str(model), "--format", "json"]) == 3
    document = json.loads(capsys.readouterr().out)
    assert document["ok"] is False
    assert "kept-rows" in [check["name"] for check in document["checks"] if not check["ok"]]
    assert main(["verify", str(trimmed), "-m", str(model)]) == 3
    assert "FAILED kept-rows" in capsys.readouterr().out


def test_result_is_stored_and_the_folder_stays_whole(copied, capsys, tmp_path):
    model, trimmed = copied("bert_encoder")
    texts = tmp_path / "texts.txt"
    texts.write_text("the cat\n\nsat on a mat\n", "utf-8")
    assert main(["verify", str(trimmed), "-m", str(model), "--texts", str(texts)]) == 0
    capsys.readouterr()
    folder = open_folder(trimmed, verify="full")
    stored = folder.manifest.verification
    assert stored["ok"] is True
    assert {check["name"] for check in stored["checks"]} >= {"kept-rows", "hidden-states"}
    assert "bit for bit equal" in (trimmed / "README.md").read_text("utf-8")


def test_what_holds_for_one_processor_says_so(made):
    """Sums of matrices of another width are this processor's; others have the same shapes on both sides."""
    model, trimmed = made("bert")
    said = {check.name: check.detail for check in verify(trimmed, model, store=False).checks}
    about = f"on this {platform.machine()} processor"
    assert about in said["kept-logits"]
    assert about in said["runtime-outputs"]
    assert about not in said["hidden-states"] + said["cold-slots"] + said["kept-rows"]


@pytest.mark.parametrize(
    ("texts", "message"), [(b"", "holds no text"), (b"\xff\xfe", "not UTF-8"), (None, "does not exist")]
)
def test_bad_texts_are_a_usage_error(made, capsys, tmp_path, texts, message):
    _, trimmed = made("bert_encoder")
    path = tmp_path / "texts.txt"
    if texts is not None:
        path.write_bytes(texts)
    assert main(["verify", str(trimmed), "--texts", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_no_trimmed_folder_is_a_usage_error(tmp_path, capsys):
    assert main(["verify", str(tmp_path)]) == 2
    assert "not a trimmed folder" in capsys.readouterr().err
