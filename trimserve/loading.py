"""Open a trimmed folder as the object that runs it."""

from typing import TYPE_CHECKING, Literal

from trimserve.arguments import AnyPath, Threads, checked
from trimserve.encoder.encoder import Encoder
from trimserve.errors import MismatchError, UnsupportedModelError, UsageError
from trimserve.folder.hub import find_folder
from trimserve.folder.opening import TrimmedFolder, open_folder
from trimserve.folder.tasks import GENERATION_TASK, GENERATOR_TASKS, TEXT2TEXT_TASK
from trimserve.process import release_free_memory
from trimserve.runtime.cold_rows import COLD_INPUT, GRAPH_DTYPES, ColdRows, cold_widths
from trimserve.runtime.contract import served_fault
from trimserve.runtime.session import MemoryUse, Session, open_session, plan_memory
from trimserve.text.codec import Codec

if TYPE_CHECKING:
    from trimserve.generation.clients import AsyncClients
    from trimserve.generation.generator import Generator


@checked
def load(
    path: AnyPath,
    *,
    device: Literal["cpu", "cuda"] = "cpu",
    threads: Threads | None = None,
    memory: MemoryUse = "fast",
    verify: str | None = None,
    revision: str | None = None,
) -> "Encoder | Generator":
    """Load a trimmed folder.

    Args:
        path: a folder made by `trimserve export`, or the hub id (owner/name) of one.
        device: ``"cpu"`` or ``"cuda"``.
        threads: threads of one operator; by default the CPUs this process may use.
        memory: ``"fast"`` packs the weights into copies that the kernels like best, and keeps the memory of a
            run for the next one. ``"low"`` uses float weights where they are mapped (quantised ones are
            always packed), gives the memory of a run back, feeds an encoder fewer tokens at a time, and maps
            the tokenizer's tables (docs/tokenizers.md). docs/runtime.md says what each costs.
        verify: ``"full"`` hashes every file; ``"fast"`` all but large ones that were hashed before and not
            written to since, as the system says; ``"off"`` compares sizes. By default what
            `TRIMSERVE_VERIFY` says, else fast.
        revision: branch, tag or commit of a hub id.

    Returns:
        An Encoder or a Generator, by the folder's task.

    Raises:
        UsageError: not a trimmed folder, or one without a graph.
        MismatchError: a file of it is missing or changed, or its parts do not fit.
        UnsupportedModelError: a layout or a task that this runtime does not run.
        MissingExtraError: onnxruntime is not installed; or a hub id, and huggingface_hub is not.
        TrimserveError: there is not enough memory, or the folder was replaced just now and there is no room
            for a copy of its graph.
    """
    folder = open_folder(find_folder(path, revision), verify=verify)
    check_runnable(folder)
    codec = Codec(folder, mapped=memory == "low")
    release_free_memory()  # before the graphs are read, so that both peaks do not add up
    plan = plan_memory(memory, quantized=folder.manifest.quantization is not None)
    sessions = {
        role: open_session(
            folder.graph(name), device=device, threads=threads, prepack=plan.prepack, arena=plan.arena
        )
        for role, name in folder.manifest.graphs.items()
    }
    if not plan.arena:
        release_free_memory()  # what packing and optimising left
    cold = ColdRows(folder, widths=_row_widths(folder, next(iter(sessions.values()))))
    _check_graphs(folder, sessions)
    if folder.manifest.task not in GENERATOR_TASKS:
        return Encoder(folder, sessions["model"], codec, cold)
    # An encoder's process needs none of these.
    from trimserve.generation.generator import Generator
    from trimserve.generation.text2text import Text2TextGenerator
    from trimserve.runtime.decoder import Decoder
    from trimserve.runtime.seq2seq import Seq2seqDecoder

    if folder.manifest.task == GENERATION_TASK:
        decoder = Decoder(sessions["model"], device=device, lengths=folder.manifest.lengths)
        return Generator(folder, decoder, codec, cold, threads=threads, clients=_async_clients)
    pair = Seq2seqDecoder(sessions["encoder"], sessions["decoder"], codec, cold, device=device)
    return Text2TextGenerator(folder, pair, codec, cold, threads=threads, clients=_async_clients)


def _async_clients(generator: "Generator") -> "AsyncClients":
    # Whoever calls nothing of async code does without it.
    from trimserve.engine.clients import EngineClients

    return EngineClients(generator)


def _check_graphs(folder: TrimmedFolder, sessions: dict[str, Session]) -> None:
    for role, session in sessions.items():
        if (fault := served_fault(session, folder.manifest.task, role)) is not None:
            raise UnsupportedModelError(
                f"{folder.path}: as {folder.manifest.task}, the graph {fault}, so it was not made for "
                "serving: export the model again."
            )


def check_runnable(folder: TrimmedFolder) -> None:
    """Refuse a folder that this runtime does not run.

    Raises:
        UsageError: it holds no graph.
        UnsupportedModelError: a layout for others, or a graph is missing.
        MismatchError: it names a dtype that no graph has.
    """
    manifest = folder.manifest
    if not manifest.graphs:
        raise UsageError(
            f"{folder.path} holds no ONNX graph (--to safetensors or gguf): load it with transformers, vLLM "
            "or llama.cpp, or export the model with --to onnx."
        )
    if manifest.layout != "runtime":
        raise UnsupportedModelError(
            f"{folder.path} has the layout {manifest.layout!r}, which is for other runtimes: this one runs "
            "folders exported with --layout runtime."
        )
    if manifest.dtype not in GRAPH_DTYPES:
        raise MismatchError(
            f"{folder.path} says that its graph is in {manifest.dtype!r}, and known are "
            f"{', '.join(GRAPH_DTYPES)}: export the folder again."
        )
    roles = {"encoder", "decoder"} if manifest.task == TEXT2TEXT_TASK else {"model"}
    if missing := sorted(roles - manifest.graphs.keys()):
        raise UnsupportedModelError(
            f"{folder.path} was exported for {manifest.task!r}, but names no graph for {', '.join(missing)}: "
            "export the model again."
        )


def _row_widths(folder: TrimmedFolder, session: Session) -> tuple[int, ...]:
    widths = cold_widths(session)
    if COLD_INPUT not in widths:
        raise UnsupportedModelError(
            f"the graph in {folder.path} has no input {COLD_INPUT!r}, so it was not made for serving: export "
            "the model again."
        )
    return tuple(widths.values())
