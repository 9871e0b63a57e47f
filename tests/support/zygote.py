"""Commands in processes that die where a test says: one process imports all and forks a child for each.

A fault is one of: `{"kill": n}`, perhaps with another `"signal"` than SIGKILL, and `{"full": n}`, at the n-th
time the child changes something under the root (from 1; a full disk stays full for whatever makes files), and
`{"signal": number, "after": seconds}`.
"""

import errno
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.support.limits import PATIENCE, limit_this_process

ROOT = Path(__file__).parents[2]
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_GROWS = ("open", "os.mkdir", "os.link")
_CHANGES = (*_GROWS, "os.rename", "os.remove", "os.rmdir", "trimserve.exchange", "os.truncate")


@dataclass(frozen=True)
class Done:
    """How a command ended: exit code (minus the signal that killed it), stderr, changes.

    A hang, as `limits` has it, has no code.
    """

    code: int | None
    stderr: str
    changes: int
    seconds: float


class Zygote:
    """The process that forks; use it as a context."""

    def __init__(self, work: Path, *, modules: tuple[str, ...] = ()) -> None:
        self._work = work
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"HF_HUB_OFFLINE": "1", "TMPDIR": str(work / "tmp")}
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(ROOT), str(ROOT / "export"), environment.get("PYTHONPATH", "")]
        )
        (work / "tmp").mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "tests.support.zygote", *modules]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, env=environment, cwd=ROOT, text=True
        )

    def run(
        self, root: Path, *argv: object, fault: dict[str, Any] | None = None, cwd: Path | None = None
    ) -> Done:
        """Run `trimserve ARGV` in a child; changes are counted under `root`."""
        job = {"argv": list(map(str, argv)), "root": str(root), "fault": fault or {}}
        job |= {"log": str(self._work / "log"), "cwd": str(cwd or root)}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return Done(**json.loads(self._process.stdout.readline()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.communicate()


def _serve(lines: Any, answers: Any) -> None:
    for line in lines:
        job = json.loads(line)
        log = Path(job["log"])
        count = log.with_suffix(".count")
        count.write_bytes(bytes(8))
        start = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _child(job, log, count)
        code = _wait(pid, start, job["fault"])
        changes = int.from_bytes(count.read_bytes(), "little")
        seconds = time.monotonic() - start
        done = {
            "code": code,
            "stderr": log.read_text(errors="replace"),
            "changes": changes,
            "seconds": seconds,
        }
        answers.write(json.dumps(done) + "\n")
        answers.flush()


def _wait(pid: int, start: float, fault: dict[str, Any]) -> int | None:
    due = start + fault["after"] if "after" in fault else None
    end = start + PATIENCE
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            code = os.waitstatus_to_exitcode(status)
            return None if code == -signal.SIGXCPU else code
        now = time.monotonic()
        if due is not None and now >= due:
            os.kill(pid, fault["signal"])
            due, end = None, now + PATIENCE
        if now >= end:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.001)


def _child(job: dict[str, Any], log: Path, count: Path) -> None:
    code = 70
    limit_this_process()
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for number, descriptor in enumerate((nowhere, nowhere, output)):
            os.dup2(descriptor, number)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - lives as long as the process
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        os.chdir(job["cwd"])
        from trimserve.cli.main import main

        sys.argv = ["trimserve", *job["argv"]]
        _watch(job["root"], job["fault"], os.open(count, os.O_WRONLY))
        code = main()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _watch(root: str, fault: dict[str, Any], counter: int) -> None:
    seen = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal seen
        if event not in _CHANGES or not _is_change(event, args, root):
            return
        seen += 1
        os.pwrite(counter, seen.to_bytes(8, "little"), 0)
        if seen == fault.get("kill"):
            os.kill(os.getpid(), fault.get("signal", signal.SIGKILL))
        at = fault.get("full")
        if (
            at is not None
            and (seen == at or (seen > at and event in _GROWS))
            and event not in ("os.remove", "os.rmdir")
        ):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sys.addaudithook(hook)


def _is_change(event: str, args: tuple[Any, ...], root: str) -> bool:
    if event == "open":
        path, _, flags = args
        if not isinstance(path, (str, bytes, os.PathLike)) or not (flags or 0) & _WRITES:
            return False
    named = [os.fsdecode(path) for path in args[:2] if isinstance(path, (str, bytes, os.PathLike))]
    # Names without a folder: of a tree that is being removed.
    return any(name.startswith(root) or not name.startswith("/") for name in named)


def main() -> None:
    """Import, then fork a child for each line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for name in sys.argv[1:]:
        __import__(name)
    _serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
