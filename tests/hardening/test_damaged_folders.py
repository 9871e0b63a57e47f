"""Damage of every file of a folder, counted: a sentence, or the very same answers; never anything else.

Without new hashes in the manifest, a damage is what a disk or a copy does; with them it is what an attacker
can do, who gets other numbers at most.
"""

import json
import random
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("torch")

from tests.support.counting import Counter, is_sentence, outcome_of
from tests.support.damage import damage
from tests.support.served_models import FILES, KINDS, answers
from trimserve.errors import TrimserveError
from trimserve.folder.names import MANIFEST_NAME

pytestmark = pytest.mark.export

SEED = 20261201
# Of CI, and of the slow suite: how many without and with new hashes, and of graphs with them.
FAST = (1_640, 320, 40)
SLOW = (5_000, 1_500, 150)
# The graphs themselves are read by ONNX Runtime, in a process of its own.
_TRIED = "tried "  # begins a line about a graph
_ALL = (*FILES, "chat_int4")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("damaged")
    made = {name: KINDS[name].export(root / name) for name in _ALL}
    return {name: (path, answers(name, path)) for name, path in made.items()}


class Trial:
    """Damages one file after another of a copy, and puts each right again."""

    def __init__(self, name, path, said, root):
        self.name, self.path, self.said = name, root / name, said
        shutil.copytree(path, self.path)
        self.files = [file.name for file in self.path.iterdir()]
        self.whole = {file: (self.path / file).read_bytes() for file in self.files}

    def damage(self, number, *, rehashed, graphs=None):
        """Damage a file; the name of it."""
        random_ = random.Random(f"{SEED}-{number}")
        names = [file for file in self.files if graphs is None or file.endswith(".onnx") is graphs]
        if rehashed:
            names = [file for file in names if file != "README.md"]
        file = random_.choice(names)
        content, _ = damage(self.whole[file], random_)
        (self.path / file).write_bytes(content)
        if rehashed and file != MANIFEST_NAME:
            self._rehash(file, content)
        return file

    def _rehash(self, file, content):
        import hashlib

        manifest = json.loads(self.whole[MANIFEST_NAME])
        digest = hashlib.sha256(content).hexdigest()
        manifest["files"][file] = {"bytes": len(content), "sha256": digest}
        if file == manifest["tokenizer"].get("file", "tokenizer.json"):
            manifest["tokenizer_sha256"] = digest
        (self.path / MANIFEST_NAME).write_text(json.dumps(manifest))

    def restore(self):
        for file, content in self.whole.items():
            if (self.path / file).read_bytes() != content:
                (self.path / file).write_bytes(content)

    def outcome(self, *, rehashed):
        """What loading and asking gives: "refused", "same", "other", or a fault with its reason."""
        said = []

        def ask():
            try:
                said.append(answers(self.name, self.path))
            except TrimserveError as error:
                if not is_sentence(error):
                    raise
                said.append(None)

        if fault := outcome_of(ask):
            return f"fault: {fault}"
        if said == [None]:
            return "refused"
        if said == [self.said]:
            return "same"
        return "other" if rehashed else "fault: other answers"


def run(counter, folders, root, count, *, rehashed, first=0):
    trials = [Trial(name, *folders[name], root) for name in folders]
    for number in range(first, first + count):
        trial = trials[number % len(trials)]
        file = trial.damage(number, rehashed=rehashed, graphs=False if rehashed else None)
        enter(counter, f"{number} {trial.name}/{file}", trial.outcome(rehashed=rehashed))
        trial.restore()
    counter.check()


def enter(counter, what, found):
    """Count an outcome."""
    kind, _, fault = found.partition(": ")
    counter.add(kind, what, fault or None)


PLAIN = "damaged folders"
REHASHED = "damaged folders with new hashes"


def test_damage_is_refused_or_changes_nothing(folders, tmp_path):
    run(Counter(PLAIN, SEED), folders, tmp_path, FAST[0], rehashed=False)


def test_damage_with_new_hashes_is_refused_or_gives_numbers(folders, tmp_path):
    run(Counter(REHASHED, SEED), folders, tmp_path, FAST[1], rehashed=True)


def test_damaged_graphs_with_new_hashes_end_no_process_but_their_own(folders, tmp_path):
    _graphs(folders, tmp_path, FAST[2])


@pytest.mark.fuzz
def test_much_damage_is_refused_or_changes_nothing(folders, tmp_path):
    run(Counter(PLAIN, SEED), folders, tmp_path, SLOW[0], rehashed=False, first=100_000)


@pytest.mark.fuzz
def test_much_damage_with_new_hashes_is_refused_or_gives_numbers(folders, tmp_path):
    run(Counter(REHASHED, SEED), folders, tmp_path, SLOW[1], rehashed=True, first=200_000)


@pytest.mark.fuzz
def test_many_damaged_graphs_with_new_hashes(folders, tmp_path):
    _graphs(folders, tmp_path, SLOW[2], first=300_000)


def _graphs(folders, root, count, first=0):
    """Damage graphs in processes of their own, which go on where one died."""
    given = {name: (str(path), said) for name, (path, said) in folders.items()}
    (root / "given.json").write_text(json.dumps(given))
    number, counter = first, Counter("damaged graphs with new hashes", SEED)
    while number < first + count:
        shutil.rmtree(root / "work", ignore_errors=True)
        (root / "work").mkdir()
        command = [sys.executable, "-m", __name__, str(root), str(number), str(first + count - number)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        # ONNX Runtime prints lines of its own.
        lines = [line for line in done.stdout.splitlines() if line.startswith(_TRIED)]
        for line in lines:
            enter(counter, *line.removeprefix(_TRIED).split(": ", 1))
        number += len(lines)
        if done.returncode:
            assert done.returncode < 0, done.stderr[-2000:]
            counter.add("ended by ONNX Runtime with its process")
            number += 1
    counter.check()


def _main(root, first, count):
    from pathlib import Path

    given = json.loads((root / "given.json").read_text())
    folders = {name: (Path(path), said) for name, (path, said) in given.items()}
    trials = [Trial(name, *folders[name], root / "work") for name in folders]
    for number in range(first, first + count):
        trial = trials[number % len(trials)]
        file = trial.damage(number, rehashed=True, graphs=True)
        print(f"\n{_TRIED}{number} {trial.name}/{file}: {trial.outcome(rehashed=True)}", flush=True)
        trial.restore()


if __name__ == "__main__":
    from pathlib import Path

    _main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
