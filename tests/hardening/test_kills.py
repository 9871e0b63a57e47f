"""Commands that write, killed: by the clock at random moments, and at every single change that they make."""

import random
import signal

import pytest

pytest.importorskip("torch")
pytest.importorskip("sentence_transformers")

from tests.support.faults import Faults
from tests.support.writers import MODULES, make_writers
from tests.support.zygote import Zygote

pytestmark = [pytest.mark.export, pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="POSIX processes")]

KILLS, SLOW_KILLS = 40, 200
SEED = 20261130
NAMES = ("profile", "merge", "export", "overwrite", "verify", "restore")


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    root = tmp_path_factory.mktemp("kills")
    with Zygote(root, modules=MODULES) as zygote:
        made = Faults(zygote, root)
        made.writers = make_writers(root / "in")
        yield made


@pytest.mark.parametrize("count", [KILLS, pytest.param(SLOW_KILLS, marks=pytest.mark.slow)])
def test_random_moments(faults, count, capsys):
    chosen = random.Random(SEED + count)
    tried = faults.tried
    seconds = {name: faults.whole(faults.writers[name]).seconds for name in NAMES}
    for number in range(count):
        name = NAMES[number % len(NAMES)]
        kind = chosen.choice([signal.SIGKILL, signal.SIGTERM])
        after = chosen.uniform(0, 1.1 * seconds[name])
        faults.kill(faults.writers[name], {"signal": int(kind), "after": after})
    assert faults.tried - tried == count
    # Some of each came in time: a process that ended by the one signal, and one that handled the other.
    assert faults.codes.get(-signal.SIGKILL)
    assert faults.codes.get(128 + signal.SIGTERM)
    with capsys.disabled():
        print(f"\nkills at random moments, seed {SEED + count}: {faults}")


# The slow ones are killed at every change; else at the first, some between, and the last, which put in place.
@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_every_change(faults, name, step, capsys):
    changes = faults.whole(faults.writers[name]).changes
    moments = sorted({*range(1, changes - 6, step), *range(max(1, changes - 6), changes + 1)})
    for moment in moments:
        faults.kill(faults.writers[name], {"kill": moment})
    with capsys.disabled():
        print(f"\n{name} killed at {len(moments)} of {changes} changes: {faults}")
