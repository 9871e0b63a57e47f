"""What must hold after a fault at any moment of a command that writes."""

from pathlib import Path
from typing import Any

from tests.support.counting import Counter
from tests.support.writers import Writer
from tests.support.zygote import Done, Zygote


class Faults:
    """Runs writers with faults and asserts what must hold; keeps count.

    Attributes:
        counter: of the test that runs; it counts exit codes and what stood then.
    """

    def __init__(self, zygote: Zygote, root: Path) -> None:
        self._zygote = zygote
        self._root = root
        self.counter = Counter("faults", "none")

    def whole(self, writer: Writer) -> Done:
        """A run without a fault."""
        work = writer.fresh(self._root / "work")
        done = self._zygote.run(work, *writer.argv(work))
        assert (done.code, writer.state(work)) == (0, "new"), done.stderr
        self._assert_clean(writer, work)
        return done

    def kill(self, writer: Writer, fault: dict[str, Any]) -> int:
        """A run that is killed: what stood or what is new stands; the next run succeeds and clears up.

        Returns:
            Its exit code.
        """
        work, done, state = self._faulty(writer, fault)
        assert done.code is not None, f"a hang after {fault}"
        if fault.get("signal") == 15 and done.code != -15:  # -15: before the command had begun
            assert done.code in (0, 143), done
            assert self._sentence(done) or done.code == 0, done
            self._assert_clean(writer, work)
            assert ("no file was written" in done.stderr) <= (state != "new"), (done, state)
        again = self._zygote.run(work, *writer.argv(work))
        refused = again.code == 2 and "is not empty" in again.stderr and state == "new"
        assert again.code == 0 or refused, (fault, again)
        assert writer.state(work) == "new"
        self._assert_clean(writer, work)
        return done.code

    def fill(self, writer: Writer, fault: dict[str, Any]) -> None:
        """A run on a disk that fills up: one sentence, what stood before stands, nothing is left."""
        work, done, state = self._faulty(writer, fault)
        assert done.code is not None, f"a hang after {fault}"
        assert done.code in (0, 1), (fault, done)
        assert "Traceback" not in done.stderr, (fault, done)
        if done.code == 1:
            assert self._sentence(done), (fault, done)
            assert state != "new", (fault, done)
        self._assert_clean(writer, work)

    def _faulty(self, writer: Writer, fault: dict[str, Any]) -> tuple[Path, Done, str]:
        work = writer.fresh(self._root / "work")
        before = writer.state(work) if (work / writer.output).exists() else "absent"
        done = self._zygote.run(work, *writer.argv(work), fault=fault)
        state = writer.state(work)
        assert state in (before, "new", "partial"), (fault, done, state)
        self.counter.add(f"ended with {done.code} and left {state}")
        return work, done, state

    def _sentence(self, done: Done) -> bool:
        lines = done.stderr.strip().splitlines()
        return sum(line.startswith("trimserve: ") for line in lines) == 1 and lines[-1].startswith(
            "trimserve: "
        )

    def _assert_clean(self, writer: Writer, work: Path) -> None:
        found = sorted(path.name for path in work.iterdir())
        assert set(found) <= set(writer.listing()), found
        hidden = [path for path in self._root.rglob("*") if ".trimserve." in path.name]
        assert hidden == []
