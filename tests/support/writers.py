"""Every command that writes, on tiny models: what stands before and after, and how to tell them apart."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import trimserve
from tests.support.folders import make_vocab
from tests.support.tiny_tokenizers import KINDS, save_model_folder
from trimserve.cli.main import main
from trimserve.files.hashes import sha256_file
from trimserve.finetune.provenance import Provenance, StoredCut, describe_base
from trimserve.folder.manifest import read_manifest
from trimserve.model.resolve import resolve_model
from trimserve.model.structural import structural_ids
from trimserve.profiles.profile import Profile
from trimserve.vocab.file import save_vocab

TEXT = "the cat sat on the mat"
WIDTH = 12
# Of the commands that `make_writers` makes.
NAMES = ("profile", "merge", "export", "overwrite", "verify", "restore")
# Imported once, before the commands are forked.
MODULES = (
    "sentence_transformers",
    "trimserve.cli.commands.export",
    "trimserve.finetune.restoring",
    "trimserve.profiles.profiling",
    "trimserve_export.pipeline",
    "trimserve_export.verify.runner",
)


@dataclass(frozen=True)
class Writer:
    """A command that writes.

    Attributes:
        argv: of a run, from the folder that it writes in.
        before: what stands there before, copied for each run.
        output: name of what is written.
        state: says what stands: "old", "new", "absent", or another word for what may stand too; raises where
            it does not load.
    """

    argv: Callable[[Path], list[object]]
    before: Path
    output: str
    state: Callable[[Path], str]

    def fresh(self, work: Path) -> Path:
        """The folder as it was, without what an earlier run left."""
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(self.before, work)
        return work

    def listing(self) -> list[str]:
        """The names that stand there when all went well."""
        return sorted({*(path.name for path in self.before.iterdir()), self.output})


def static_model(path: Path, vocab_size: int = 40) -> Path:
    """Static embeddings: the model that is exported in the least time."""
    inner = path / "0_StaticEmbedding"
    inner.mkdir(parents=True)
    kind = "sentence_transformers.models.StaticEmbedding"
    (path / "modules.json").write_text(
        json.dumps([{"idx": 0, "name": "0", "path": inner.name, "type": kind}])
    )
    KINDS["wordpiece"]().save(str(inner / "tokenizer.json"))
    table = np.random.default_rng(1).normal(size=(vocab_size, WIDTH)).astype(np.float32)
    save_file({"embedding.weight": table}, inner / "model.safetensors")
    return path


def tree(path: Path) -> dict[str, bytes]:
    """The bytes of every file of a folder."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def run(*argv: object) -> None:
    """Run a command here, where it must succeed."""
    assert main(list(map(str, argv))) == 0


def make_writers(root: Path) -> dict[str, Writer]:
    """The commands by name; what they read is made under `root`."""
    root.mkdir(parents=True, exist_ok=True)
    return _profiles(root / "profiles") | _exports(root / "exports") | {"restore": _restore(root / "restore")}


def _profiles(root: Path) -> dict[str, Writer]:
    model = save_model_folder("wordpiece", root / "model")
    for name, count in (("old", 3), ("new", 50)):
        (root / f"{name}.txt").write_text(f"{TEXT}\n" * count)
        run("profile", root / f"{name}.txt", "-m", model, "-o", root / f"{name}.safetensors")
    old, new = (Profile.load(root / f"{name}.safetensors").tokens for name in ("old", "new"))
    before = root / "before"
    before.mkdir()
    shutil.copy(root / "old.safetensors", before / "p.safetensors")

    def state(work: Path) -> str:
        found = Profile.load(work / "p.safetensors").tokens
        return {old: "old", new: "new", 2 * old: "new"}.get(found, "partial")

    profile: list[object] = ["profile", root / "new.txt", "-m", model, "-o", "p.safetensors"]
    merge: list[object] = ["merge", *2 * [root / "old.safetensors"], "-o", "p.safetensors"]
    return {
        "profile": Writer(lambda _: profile, before, "p.safetensors", state),
        "merge": Writer(lambda _: merge, before, "p.safetensors", state),
    }


def _exports(root: Path) -> dict[str, Writer]:
    model = static_model(root / "model")
    source = resolve_model(model)
    structural = structural_ids(source)
    for name, last in (("old", 20), ("new", 30)):
        kept = np.union1d(structural, np.arange(10, last)).tolist()
        save_vocab(make_vocab(kept, source.vocab_size, source.tokenizer_sha256), root / f"{name}.vocab")
    places = {name: root / name for name in ("nothing", "old-one", "verified")}
    for place in places.values():
        place.mkdir()
    old, new = places["old-one"] / "out", root / "new-one"
    run("export", "-m", model, "--vocab", root / "old.vocab", "-o", old)
    run("export", "-m", model, "--vocab", root / "new.vocab", "-o", new)
    shutil.copytree(new, places["verified"] / "out")
    known = {"old": read_manifest(old).kept, "new": read_manifest(new).kept}
    expected = trimserve.load(new).encode([TEXT])  # exact: with cold rows the same whatever is kept

    def state(work: Path) -> str:
        if not (folder := work / "out").exists():
            return "absent"
        assert np.array_equal(trimserve.load(folder).encode([TEXT]), expected)
        manifest = read_manifest(folder)
        hashes = {name: entry.sha256 for name, entry in manifest.files.items()}
        assert {name: sha256_file(folder / name) for name in hashes} == hashes
        return next(name for name, kept in known.items() if kept == manifest.kept)

    def verified(work: Path) -> str:
        assert state(work) == "new"
        manifest = read_manifest(work / "out")
        said = manifest.verification is not None
        return "new" if said and "README.md" in manifest.files else "old"

    export: list[object] = ["export", "-m", model, "--vocab", root / "new.vocab", "-o", "out"]
    verify: list[object] = ["verify", "out", "-m", model]
    return {
        "export": Writer(lambda _: export, places["nothing"], "out", state),
        "overwrite": Writer(lambda _: [*export, "--overwrite"], places["old-one"], "out", state),
        "verify": Writer(lambda _: verify, places["verified"], "out", verified),
    }


def _restore(root: Path) -> Writer:
    base = save_model_folder("wordpiece", root / "base")
    size = resolve_model(base, weights=False).vocab_size
    name = "embeddings.word_embeddings.weight"
    random = np.random.default_rng(2)
    save_file({name: random.normal(size=(size, WIDTH)).astype(np.float32)}, base / "model.safetensors")
    vocab = make_vocab(range(0, size, 2), size)
    compact = Path(shutil.copytree(base, root / "compact"))
    save_file(
        {name: random.normal(size=(len(vocab), WIDTH)).astype(np.float32)}, compact / "model.safetensors"
    )
    save_vocab(vocab, compact / "vocab_map.safetensors")
    cut = (StoredCut((name,), 0),)
    Provenance(describe_base(resolve_model(base)), size, len(vocab), cut, "bert", {}, {}).write(compact)
    (root / "before").mkdir()
    run("finetune", "restore", compact, "-o", root / "full")
    expected = tree(root / "full")

    def state(work: Path) -> str:
        if not (work / "out").exists():
            return "absent"
        assert tree(work / "out") == expected
        return "new"

    argv: list[object] = ["finetune", "restore", compact, "-o", "out"]
    return Writer(lambda _: argv, root / "before", "out", state)
