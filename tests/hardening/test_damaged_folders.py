"""Damage of every file of a folder, counted: a sentence, or the very same answers; never anything else.

Without new hashes in the manifest, a damage is what a disk or a copy does; with them it is what an attacker
can do, who gets other numbers at most.
"""

import collections
import json
import random
import shutil
import subprocess
import sys
import time

import pytest

pytest.importorskip("torch")

from tests.support.damage import damaged
from tests.support.served import KINDS, answers, make
from trimserve.errors import TrimserveError
from trimserve.folder.names import MANIFEST_NAME

pytestmark = pytest.mark.export

SEED = 20261201
# Of CI, and of the slow suite: how many without and with new hashes, and of graphs with them.
FAST = (1_640, 320, 40)
SLOW = (14_000, 5_500, 500)
LONGEST_SECONDS = 10.0
# The graphs themselves are read by ONNX Runtime, in a process of its own.
_ALL = (*KINDS, "quantised")


def _make(name, root):
    if name == "quantised":
        return make("generator", root, quantize="int4")
    return make(name, root)


def _kind(name):
    return "generator" if name == "quantised" else name


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("damaged")
    made = {name: _make(name, root / name) for name in _ALL}
    return {name: (path, answers(_kind(name), path)) for name, path in made.items()}


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
        content = damaged(self.whole[file], file, random_)
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
        start, waited = time.process_time(), time.monotonic()
        try:
            said = answers(_kind(self.name), self.path)
        except TrimserveError as error:
            found = "refused" if _is_sentence(str(error)) else f"fault: {error!r} is no sentence"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            found = f"fault: {error!r:.300}"
        else:
            found = "same" if said == self.said else "other"
            if found == "other" and not rehashed:
                found = "fault: other answers"
        # Of the processor: a busy machine takes longer. What waits for ever is cut off by the longer limit.
        seconds, waited = time.process_time() - start, time.monotonic() - waited
        if seconds > LONGEST_SECONDS or waited > 10 * LONGEST_SECONDS:
            return f"fault: took {seconds:.1f} seconds, {waited:.1f} with waiting"
        return found


def _is_sentence(message):
    return bool(message) and "\n" not in message and len(message) < 2_000


def run(folders, root, count, *, rehashed, graphs=None, first=0):
    trials = [Trial(name, *folders[name], root) for name in folders]
    outcomes, faults = collections.Counter(), []
    for number in range(first, first + count):
        trial = trials[number % len(trials)]
        file = trial.damage(number, rehashed=rehashed, graphs=graphs)
        found = trial.outcome(rehashed=rehashed)
        trial.restore()
        outcomes[found.partition(":")[0]] += 1
        if found.startswith("fault"):
            faults.append(f"{number} {trial.name}/{file}: {found}")
    return outcomes, faults


def _report(what, count, outcomes, faults):
    print(f"\n{what}: {count:,} damages, seed {SEED}: {dict(outcomes)}")
    assert not faults, f"{len(faults)} faults, such as\n" + "\n".join(faults[:40])


def test_damage_is_refused_or_changes_nothing(folders, tmp_path):
    _report("as found", FAST[0], *run(folders, tmp_path, FAST[0], rehashed=False))


def test_damage_with_new_hashes_is_refused_or_gives_numbers(folders, tmp_path):
    _report("rehashed", FAST[1], *run(folders, tmp_path, FAST[1], rehashed=True, graphs=False))


def test_damaged_graphs_with_new_hashes_end_no_process_but_their_own(folders, tmp_path):
    _graphs(folders, tmp_path, FAST[2])


@pytest.mark.slow
def test_much_damage_is_refused_or_changes_nothing(folders, tmp_path):
    _report("as found", SLOW[0], *run(folders, tmp_path, SLOW[0], rehashed=False, first=100_000))


@pytest.mark.slow
def test_much_damage_with_new_hashes_is_refused_or_gives_numbers(folders, tmp_path):
    _report("rehashed", SLOW[1], *run(folders, tmp_path, SLOW[1], rehashed=True, graphs=False, first=200_000))


@pytest.mark.slow
def test_many_damaged_graphs_with_new_hashes(folders, tmp_path):
    _graphs(folders, tmp_path, SLOW[2], first=300_000)


def _graphs(folders, root, count, first=0):
    """Damage graphs in processes of their own, which go on where one died."""
    given = {name: (str(path), said) for name, (path, said) in folders.items()}
    (root / "given.json").write_text(json.dumps(given))
    number, died, outcomes, faults = first, [], collections.Counter(), []
    while number < first + count:
        shutil.rmtree(root / "work", ignore_errors=True)
        (root / "work").mkdir()
        command = [sys.executable, "-m", __name__, str(root), str(number), str(first + count - number)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = done.stdout.splitlines()
        for line in lines:
            found = line.partition(": ")[2]
            outcomes[found.partition(":")[0]] += 1
            if found.startswith("fault"):
                faults.append(line)
        number += len(lines)
        if done.returncode:
            assert done.returncode < 0, done.stderr[-2000:]
            died.append((number, done.returncode))
            outcomes["died"] += 1
            number += 1
    print(f"\nprocesses that ONNX Runtime ended: {len(died)} {died[:10]}")
    _report("graphs, rehashed", count, outcomes, faults)


def _main(root, first, count):
    from pathlib import Path

    given = json.loads((root / "given.json").read_text())
    folders = {name: (Path(path), said) for name, (path, said) in given.items()}
    trials = [Trial(name, *folders[name], root / "work") for name in folders]
    for number in range(first, first + count):
        trial = trials[number % len(trials)]
        file = trial.damage(number, rehashed=True, graphs=True)
        print(f"{number} {trial.name}/{file}: {trial.outcome(rehashed=True)}", flush=True)
        trial.restore()


if __name__ == "__main__":
    from pathlib import Path

    _main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
