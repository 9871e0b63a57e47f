"""Damaged profiles, vocabs, keep files and finetune.json: one sentence, or no harm."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.counting import Counter, outcome_of
from tests.support.damage import damage
from tests.support.profiles import make_profile
from tests.support.tiny_tokenizers import save_model_folder
from trimserve.corpus.files import CorpusSource
from trimserve.finetune.provenance import PROVENANCE_NAME, Provenance, StoredCut
from trimserve.folder.manifest import Source
from trimserve.folder.sentence import Dense, Normalize, Pooling, SentenceSettings
from trimserve.model.resolve import resolve_model
from trimserve.process import peak_resident
from trimserve.profiles.difference import diff
from trimserve.profiles.forecast import corpus_curve
from trimserve.profiles.merging import check_vocab, merge
from trimserve.profiles.profile import Profile
from trimserve.reporting.facts import Inputs, gather
from trimserve.reporting.page import render
from trimserve.reporting.terminal import summarise
from trimserve.selection.select_ids import select
from trimserve.text.names import TokenNames
from trimserve.vocab.file import load_vocab, save_vocab

SEED, TRIED, TRIED_SLOWLY = 15, 2_000, 6_000
MOST_MEMORY = 1 << 30
SETTINGS = SentenceSettings(
    modules=(Pooling(("cls", "mean")), Dense("Tanh"), Normalize()),
    prompts={"query": "query: "},
    default_prompt_name="query",
    prompt_ends=(2, 3),
    max_tokens=32,
)


class Artefacts:
    """One good file of each kind, and what is done with a damaged one."""

    def __init__(self, root: Path) -> None:
        self.model = resolve_model(save_model_folder("byte_level_bpe", root / "model"))
        self.tokenizer = self.model.tokenizer()
        size, rng = self.model.vocab_size, np.random.default_rng(1)
        counts = rng.integers(0, 50, size)
        self.profile = make_profile(
            counts,
            sha=self.model.tokenizer_sha256,
            name=str(self.model.path),
            texts=60,
            characters=10_000,
            sources=(CorpusSource("a.txt", "0" * 64, 10_000),),
            structural=np.arange(8, dtype=np.int32),
            output_counts=counts // 2,
            document_counts=np.minimum(counts, 9),
            skipped={"bad rows": 2},
            linear_widths=(16, 24),
            row_bytes=64,
        )
        self.profile.save(root / "profile.safetensors")
        self.vocab = select(self.profile, top_k=128)
        save_vocab(self.vocab, root / "vocab.safetensors")
        save_vocab(select(self.profile, top_k=256, output_coverage=0.9), root / "head.safetensors")
        (root / "ids.json").write_text(json.dumps([1, 2, 300]))
        (root / "words.json").write_text(json.dumps(["the", "cat"]))
        (root / "named.json").write_text(json.dumps({"a": self.tokenizer.token_to_id("a")}))
        (root / "keep.txt").write_text("1\n2\n300\n")
        cut = (StoredCut(("model.embed_tokens.weight", "lm_head.weight"), 0),)
        base = Source("owner/name", "main", {"model.safetensors": "0" * 64})
        Provenance(base, size, 128, cut, "model", {"vocab_size": size}, {"eos_token_id": 3}).write(root)
        (root / "sentence_modules.json").write_text(SETTINGS.to_json())
        self.root = root
        keep = dict.fromkeys(("ids.json", "words.json", "named.json", "keep.txt"), self.kept)
        self.uses: dict[str, Callable[[Path], object]] = {
            "profile.safetensors": self.profiled,
            "vocab.safetensors": self.reported,
            "head.safetensors": self.reported,
            **keep,
            PROVENANCE_NAME: lambda path: Provenance.read(path.parent),
            "sentence_modules.json": lambda path: SentenceSettings.from_json(
                path.read_text("utf-8", "surrogateescape"), str(path)
            ),
        }

    def profiled(self, path: Path) -> None:
        """Merge, compare, select, report."""
        loaded = Profile.load(path)
        corpus_curve(loaded)
        merge([self.profile, loaded])
        merge([self.profile, loaded], weights=[1, 2])
        diff(self.profile, loaded)
        self._report(loaded, select(loaded, model=self.model))

    def reported(self, path: Path) -> None:
        """A page on a vocab."""
        vocab = load_vocab(path)
        check_vocab(self.profile, vocab)
        self._report(self.profile, vocab)

    def kept(self, path: Path) -> None:
        """A keep list."""
        select(self.profile, keep_file=path, model=self.model)

    def _report(self, profile: Profile, vocab) -> None:
        names = TokenNames(self.tokenizer)
        report = gather(Inputs(profiles={"a": profile}, merged=profile, vocab=vocab, names=names))
        render(report, "title")
        summarise(report, "title")


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory) -> Artefacts:
    return Artefacts(tmp_path_factory.mktemp("artefacts"))


def attack(artefacts: Artefacts, count: int, seed: int, root: Path) -> Counter:
    rng, counter = random.Random(seed), Counter("damaged artefacts", seed)
    for number in range(count):
        name = rng.choice(list(artefacts.uses))
        folder = root / str(number)
        folder.mkdir()
        content, what = damage((artefacts.root / name).read_bytes(), rng)
        (folder / name).write_bytes(content)
        before = peak_resident()
        fault = outcome_of(lambda name=name, folder=folder: artefacts.uses[name](folder / name))
        if fault is None and peak_resident() - before > MOST_MEMORY:
            fault = "too much memory"
        counter.add(name, f"{name}: {what}", fault)
        shutil.rmtree(folder)
    return counter


def test_good_artefacts_are_used(artefacts, tmp_path):
    for name, use in artefacts.uses.items():
        shutil.copy(artefacts.root / name, tmp_path / name)
        use(tmp_path / name)


def test_settings_come_back(artefacts):
    text = (artefacts.root / "sentence_modules.json").read_text()
    assert SentenceSettings.from_json(text, "x") == SETTINGS


def test_damaged_artefacts(artefacts, tmp_path):
    attack(artefacts, TRIED, SEED, tmp_path).check()


@pytest.mark.fuzz
def test_many_damaged_artefacts(artefacts, tmp_path):
    attack(artefacts, TRIED_SLOWLY, SEED + 1, tmp_path).check()
