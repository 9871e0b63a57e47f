"""Commands that write, killed: by the clock at random moments, and at every single change that they make."""

import random
import signal

import pytest

pytest.importorskip("torch")
pytest.importorskip("sentence_transformers")

from tests.support.counting import Counter
from tests.support.writers import NAMES

pytestmark = [pytest.mark.export, pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="POSIX processes")]

KILLS, SLOW_KILLS = 40, 200
SEED = 20261130


@pytest.mark.parametrize("count", [KILLS, pytest.param(SLOW_KILLS, marks=pytest.mark.fuzz)])
def test_random_moments(faults, count):
    faults.counter = Counter("kills at random moments", SEED + count)
    chosen = random.Random(SEED + count)
    seconds = {name: faults.whole(faults.writers[name]).seconds for name in NAMES}
    for number in range(count):
        name = NAMES[number % len(NAMES)]
        kind = chosen.choice([signal.SIGKILL, signal.SIGTERM])
        after = chosen.uniform(0, 1.1 * seconds[name])
        faults.kill(faults.writers[name], {"signal": int(kind), "after": after})
    faults.counter.check()
    assert faults.counter.tried == count


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_each_signal_ends_a_command_in_its_way(faults, kind):
    """What a random moment may miss: it comes while the command writes."""
    code = faults.kill(faults.writers["overwrite"], {"kill": 3, "signal": int(kind)})
    assert code == (-kind if kind == signal.SIGKILL else 128 + kind)


# The slow ones are killed at every change; else at the first, some between, and the last, which put in place.
@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.fuzz)])
@pytest.mark.parametrize("name", NAMES)
def test_every_change(faults, name, step):
    faults.counter = Counter(f"kills of {name} at its changes", "none")
    changes = faults.whole(faults.writers[name]).changes
    moments = sorted({*range(1, changes - 6, step), *range(max(1, changes - 6), changes + 1)})
    for moment in moments:
        faults.kill(faults.writers[name], {"kill": moment})
    faults.counter.check()
