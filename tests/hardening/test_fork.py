"""A child that was forked from a used model gives what its parent gives, and ends; it never hangs."""

import gc
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
if not hasattr(os, "fork"):
    pytest.skip("this system has no fork", allow_module_level=True)

from tests.support.counting import Counter
from tests.support.limits import PATIENCE, limit_this_process
from tests.support.served_models import KINDS, USUAL, open_model
from trimserve.concurrency import Lock, Once, renew_in_child
from trimserve.errors import UsageError
from trimserve.runtime.cold_head import PartedGraph
from trimserve.runtime.session import Session, open_session
from trimserve_export.exporters.choice import is_installed

pytestmark = [
    pytest.mark.export,
    # Newer Pythons warn of every fork of a process with threads, which is what is tested here.
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]

SEED = 15
CI_FORKS, SLOW_FORKS = 5, 60
_CALLS = 5  # of a child


def in_child(job: Callable[[], Any]) -> Any:
    """What a job gives in a forked child; fails where the child hangs (see `limits`) or dies."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        limit_this_process()
        try:
            answer: Any = ("gave", job())
        except BaseException as error:
            answer = ("raised", f"{type(error).__name__}: {error}")
        with os.fdopen(writing, "wb") as pipe:
            pickle.dump(answer, pipe)
        os._exit(0)
    os.close(writing)
    content = b""
    end = time.monotonic() + PATIENCE
    os.set_blocking(reading, False)
    ended = False
    while not ended and time.monotonic() < end:
        ended = os.waitpid(child, os.WNOHANG)[0] != 0
        with suppress(BlockingIOError):
            content += os.read(reading, 1 << 20)
        time.sleep(0.01)
    if not ended:
        os.kill(child, 9)
        os.waitpid(child, 0)
    os.set_blocking(reading, True)
    with os.fdopen(reading, "rb") as pipe:
        content += pipe.read()
    assert ended, "the child hung"
    assert content, "the child died"
    return pickle.loads(content)


def some_calls(name: str, count: int, seed: int = SEED) -> dict[str, Callable[[Any], Any]]:
    calls = KINDS[name].calls()
    chosen = random.Random(seed).sample(sorted(calls), min(count, len(calls)))
    return {call: calls[call] for call in chosen}


def answers(model: Any, calls: dict[str, Callable[[Any], Any]]) -> dict[str, Any]:
    return {name: call(model) for name, call in calls.items()}


@pytest.mark.parametrize(
    ("name", "threads"), [*((name, 2) for name in USUAL), ("tied", 1), ("embeddings", 1), ("seq2seq", 1)]
)
def test_a_child_of_a_used_model(served, name, threads):
    model, calls = open_model(served(name), threads), some_calls(name, _CALLS)
    expected = answers(model, calls)
    assert in_child(lambda: answers(model, calls)) == ("gave", expected)
    assert answers(model, calls) == expected  # the parent goes on


@pytest.mark.parametrize("name", ["embeddings", "tied"])
def test_a_child_of_a_process_that_asks_for_the_tokenizers_threads(served, name, monkeypatch):
    """It has none of them, and `tokenizers` would wait for them for ever."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    test_a_child_of_a_used_model(served, name, 2)


@pytest.mark.next
@pytest.mark.skipif(not is_installed("genai"), reason="needs transformers 5 and onnxruntime-genai")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_child_of_a_model_with_shared_buffers(served, threads):
    test_a_child_of_a_used_model(served, "shared_kv", threads)


@pytest.mark.parametrize("threads", [1, 2])
def test_children_of_children(served, threads):
    model, calls = open_model(served("untied"), threads), some_calls("untied", _CALLS)
    expected = answers(model, calls)

    def grandchild() -> Any:
        own = answers(model, calls)
        return own, in_child(lambda: answers(model, calls))

    assert in_child(grandchild) == ("gave", (expected, ("gave", expected)))


def test_a_child_of_a_model_that_was_not_used(served):
    model, calls = open_model(served("tied"), 2), some_calls("tied", _CALLS)
    found = in_child(lambda: answers(model, calls))
    assert found == ("gave", answers(model, calls))


@pytest.mark.parametrize("name", ["untied", "seq2seq"])
def test_a_stream_that_was_begun_goes_on_in_the_child(served, name):
    model = open_model(served(name), 2)
    options = {"max_new_tokens": 20, "max_block": 2, "temperature": 1.5, "seed": 4}
    whole = "".join(model.stream("the cat", **options))
    stream = model.stream("the cat", **options)
    first = next(stream)
    assert in_child(lambda: first + "".join(stream)) == ("gave", whole)
    assert first + "".join(stream) == whole


@contextmanager
def busy(model: Any, calls: dict[str, Callable[[Any], Any]], threads: int = 4) -> Iterator[None]:
    """The model at work in other threads."""
    stop = threading.Event()

    def work(number: int) -> None:
        rng = random.Random(number)
        while not stop.is_set():
            calls[rng.choice(sorted(calls))](model)

    workers = [threading.Thread(target=work, args=(n,), daemon=True) for n in range(threads)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        stop.set()
        for worker in workers:
            worker.join(60)


@pytest.mark.parametrize("name", ["untied", "tagger", "seq2seq"])
def test_children_of_a_model_at_work_in_other_threads(served, name):
    fork_at_work(served(name), name, CI_FORKS)


@pytest.mark.fuzz
@pytest.mark.parametrize("name", USUAL)
def test_many_children_of_a_model_at_work_in_other_threads(served, name):
    fork_at_work(served(name), name, SLOW_FORKS // len(USUAL))


def fork_at_work(folder: Path, name: str, forks: int) -> None:
    model, calls = open_model(folder, 2), some_calls(name, 12)
    expected = answers(model, calls)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    counter = Counter(f"children of {name} at work", SEED)
    try:
        with busy(model, calls):
            for number in range(forks):
                time.sleep(random.Random(number).random() * 0.02)
                chosen = {call: calls[call] for call in sorted(calls)[number % 6 :: 6]}
                found = in_child(lambda chosen=chosen: answers(model, chosen))
                right = found == ("gave", {call: expected[call] for call in chosen})
                counter.add("forks", number, None if right else f"gave {found}")
    finally:
        sys.setswitchinterval(before)
    counter.check()


def test_pools_of_processes_and_of_threads(served):
    model, calls = open_model(served("tied"), 2), some_calls("tied", 4)
    expected = answers(model, calls)
    with ThreadPool(2) as pool:
        assert pool.map(lambda _: answers(model, calls), range(4)) == [expected] * 4
        assert in_child(lambda: answers(model, calls)) == ("gave", expected)
    context = multiprocessing.get_context("fork")
    received: Any = context.SimpleQueue()
    processes = [context.Process(target=lambda: received.put(answers(model, calls))) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
    assert [process.exitcode for process in processes] == [0, 0]
    assert [received.get() for _ in processes] == [expected, expected]

    def with_threads() -> Any:
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda _: answers(model, calls), range(2)))

    assert in_child(with_threads) == ("gave", [expected] * 2)


ENDS = """
    import os, sys, time, trimserve
    model = trimserve.load(sys.argv[1], threads=int(sys.argv[2]))
    {use}
    child = os.fork()
    if child == 0:
        {child}
        sys.exit(7)
    end = time.monotonic() + {limit}
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            sys.exit(0 if os.waitstatus_to_exitcode(status) == 7 else 1)
        time.sleep(0.02)
    os.kill(child, 9)
    sys.exit(2)
"""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("child", ["pass", "del model", "model.generate('a', max_new_tokens=3)"])
def test_a_childs_interpreter_ends(served, threads, child):
    """A session waits for its threads when it is destroyed, and a child has none of them."""
    use = "model.generate('the cat', max_new_tokens=3)"
    code = textwrap.dedent(ENDS).format(use=use, child=child, limit=PATIENCE)
    command = [sys.executable, "-W", "ignore", "-c", code, str(served("untied")), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE)
    assert done.returncode == 0, done.stderr


def test_a_lock_that_another_thread_holds_is_free_in_the_child():
    lock, held, done = Lock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            done.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(60)

    def take() -> bool:
        with lock:
            return lock.lost

    assert in_child(take) == ("gave", True)
    done.set()
    holder.join(60)
    assert in_child(take) == ("gave", False)


def test_a_lock_that_the_forking_thread_holds_stays_held():
    lock = Lock()
    with lock:

        def leave() -> bool:
            lock.__exit__(None, None, None)
            return lock.lost

        assert in_child(leave) == ("gave", False)


def test_a_value_that_another_thread_is_making_is_made_in_the_child():
    once: Once[int] = Once()
    making, done = threading.Event(), threading.Event()

    def slowly() -> int:
        making.set()
        done.wait(60)
        return 1

    maker = threading.Thread(target=lambda: once.get(slowly))
    maker.start()
    making.wait(60)
    assert in_child(lambda: once.get(lambda: 2)) == ("gave", 2)
    done.set()
    maker.join(60)
    assert once.get(lambda: 3) == 1


def test_a_tokenizer_that_was_in_use_is_read_again(served):
    model = open_model(served("embeddings"))
    codec = model.codec
    expected = [ids.tolist() for ids in codec.encode(["the cat sat"], max_tokens=4)]
    held, done = threading.Event(), threading.Event()

    def borrow() -> None:
        with codec.lent() as tokenizer:
            tokenizer.enable_truncation(3)
            held.set()
            done.wait(60)

    borrower = threading.Thread(target=borrow)
    borrower.start()
    held.wait(60)
    used = codec.tokenizer

    def encode() -> Any:
        found = [ids.tolist() for ids in codec.encode(["the cat sat"], max_tokens=4)]
        return found, codec.tokenizer is used, len(codec.encode(["the cat sat on the mat " * 9])[0]) > 9

    assert in_child(encode) == ("gave", (expected, False, True))
    done.set()
    borrower.join(60)


def save_graph(path: Path, *nodes: Any, inputs: Any, constants: Any = (), **metadata: str) -> Path:
    """A graph that gives y."""
    onnx = pytest.importorskip("onnx")
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(*node, **({"to": 1} if node[0] == "Cast" else {})) for node in nodes],
        "made",
        [value(*entry) for entry in inputs],
        [value("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.helper.set_model_props(model, {f"trimserve.{key}": text for key, text in metadata.items()})
    path.write_bytes(model.SerializeToString())
    return path


def test_a_product_that_takes_all_threads_of_a_session(tmp_path):
    """The tiny models' are too small for that. In a child a session with threads is another one."""
    matrix = np.random.default_rng(0).standard_normal((1024, 1024)).astype(np.float32)
    path = save_graph(
        tmp_path / "m.onnx",
        ("MatMul", ["x", "w"], ["y"]),
        inputs=[("x", 1, ["n", 1024])],
        constants=[("w", matrix)],
    )
    session = open_session(path, threads=2)
    (expected,) = session.run(["y"], {"x": matrix})
    gave, (opened, (found,)) = in_child(lambda: (session.opened, session.run(["y"], {"x": matrix})))
    assert (gave, opened) == ("gave", 1)
    np.testing.assert_array_equal(found, expected)


def test_parts_that_threads_of_our_own_work_on(tmp_path):
    path = save_graph(
        tmp_path / "m.onnx",
        ("Cast", ["part"], ["number"]),
        ("Add", ["hidden_states", "number"], ["y"]),
        inputs=[("hidden_states", 1, ["n"]), ("part", 7, [])],
        parts="[1, 1, 1]",
    )
    parted = PartedGraph(path, threads=2, packed=False)

    def outputs() -> list[float]:
        return parted.each(["y"], np.zeros(1, np.float32), lambda _, made: float(made[0][0]))

    assert outputs() == [0.0, 1.0, 2.0]
    assert in_child(outputs) == ("gave", [0.0, 1.0, 2.0])
    assert outputs() == [0.0, 1.0, 2.0]


class Fake:
    """Stands in for ONNX Runtime's session; says when it is destroyed."""

    destroyed = 0

    def __del__(self) -> None:
        Fake.destroyed += 1

    def run(self, names: Any, feeds: Any) -> str:
        return f"{names} {feeds}"


@pytest.mark.parametrize(
    ("threads", "in_use", "opened"), [(1, False, 1), (1, True, 2), (2, False, 2)], ids=str
)
def test_a_session_is_opened_again_where_it_has_to_be(tmp_path, threads, in_use, opened):
    made: list[Fake] = []

    def make() -> Any:
        made.append(Fake())
        return made[-1]

    session = Session(tmp_path / "m.onnx", make, device="cpu", threads=threads)
    if in_use:
        session._in_use.__enter__()
    session.renew()
    assert len(made) == 1  # nothing is opened before it is needed
    assert session.run(["y"], {"x": 1}) == "['y'] {'x': 1}"
    assert len(made) == opened
    first, before = made[0], Fake.destroyed
    del first
    made[:1] = []
    del session
    gc.collect()
    # What was left behind is never destroyed.
    assert Fake.destroyed - before == (1 if opened == 1 else 0)
    made.clear()


def test_a_model_on_a_device_is_refused_in_a_child(tmp_path):
    session = Session(tmp_path / "m.onnx", Fake, device="cuda", threads=1)  # type: ignore[arg-type]
    found = in_child(lambda: session.run(None, {}))
    assert found[0] == "raised"
    assert found[1].startswith("UsageError")
    assert "load the model in the child" in found[1]
    session.renew()
    with pytest.raises(UsageError, match="cuda before this process was forked"):
        session.run(None, {})


def test_what_is_gone_is_not_renewed():
    class Thing:
        renewed = 0

        def renew(self) -> None:
            Thing.renewed += 1

    kept, gone = Thing(), Thing()
    renew_in_child(kept)
    renew_in_child(gone)
    del gone
    gc.collect()
    assert in_child(lambda: Thing.renewed) == ("gave", 1)
