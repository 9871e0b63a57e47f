"""Take another project's own graph of a model only where it gives what transformers gives in torch.

onnxruntime-genai's builder writes each architecture anew, in fused operators, and may leave out a window, a
scale or a set of rotary frequencies. Its graph is run on the model's own weights before it is taken.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from trimserve.errors import UnsupportedModelError
from trimserve.folder.tasks import GENERATION_TASK
from trimserve.foreign import foreign
from trimserve.runtime.contract import PAST, PRESENT
from trimserve.runtime.session import Session, open_session
from trimserve_export.checkpoint.lengths import length_rope, lengths_of, limits_of
from trimserve_export.checkpoint.rounding import rounding_bound
from trimserve_export.checkpoint.tasks import load_model
from trimserve_export.exporters import tracing
from trimserve_export.exporters.choice import Choice
from trimserve_export.exporters.exporter import GraphJob
from trimserve_export.serving.calibration import plain_feeds

# A short text, and how far a long one goes beyond the last limit.
_SHORT, _BEYOND = 24, 9
# Fed in one go, then one by one: decoding takes other kernels than reading a prompt.
_STEPS = 2
# Tokens x parameters of a text that is run: minutes on two cores.
_WORK, _MOST_TOKENS = 4e12, 8300


def export_compared(choice: Choice, checkpoint: Path, output: Path, job: GraphJob) -> tuple[Path, Choice]:
    """Export a checkpoint with the first exporter whose graph gives transformers' logits.

    Args:
        choice: the exporter to try first; it is taken as it is where it has no rival.
        checkpoint: a folder with the weights.
        output: the folder to write into.
        job: what to make.

    Returns:
        The graph, as `Exporter.export_checkpoint` gives it, and the exporter that made it with the reason.

    Raises:
        UnsupportedModelError: the last exporter fails, too.
    """
    rival = choice.rival
    if rival is None:
        return choice.exporter.export_checkpoint(checkpoint, output, job), choice
    try:
        made = choice.exporter.export_checkpoint(checkpoint, output / choice.name, job)
        fault, seen = _difference(made, checkpoint, job)
    except UnsupportedModelError as error:
        fault, seen = str(error).rstrip("."), ""
    if fault is None:
        return made, choice.because(f"{choice.reason}; as transformers in torch for {seen}")
    graph = rival.exporter.export_checkpoint(checkpoint, output / rival.name, job)
    return graph, rival.because(f"{rival.reason}, and {choice.name} was not taken: {fault}")


def _difference(graph: Path, checkpoint: Path, job: GraphJob) -> tuple[str | None, str]:
    """What is wrong with a graph's logits, if anything, and which texts were compared."""
    with tracing.quiet():
        model = load_model(checkpoint, job.task, "fp32", trust_remote_code=job.trust_remote_code)
    lengths, left_out = _lengths(model)
    runs = foreign("its graph cannot be run", advice="use another exporter.", error=UnsupportedModelError)
    with runs:
        session = open_session(graph)
    for length in lengths:
        ids = _ids(model, length)
        expected = _by_torch(model, ids)
        with runs:
            found = np.concatenate(list(_by_graph(session, ids)))
        error = float(np.abs(expected - found).max(initial=0.0))
        if not error <= rounding_bound(model.config, expected):
            return f"its logits of a text of {length:,} tokens are off by {error:.2g}", ""
    seen = f"texts of {' and '.join(f'{length:,}' for length in lengths)} tokens"
    return None, seen + (f", not for {left_out:,}: too many for this model here" if left_out else "")


def _lengths(model: PreTrainedModel) -> tuple[list[int], int | None]:
    """Tokens of the texts to compare, and of the one beyond all limits if it is too long to be run.

    A model looks back only, so that one text beyond all windows has what shorter ones have; but frequencies
    that change with the length are those of the whole text.
    """
    longest = lengths_of(model.config, GENERATION_TASK).longest or _MOST_TOKENS
    limits = [limit for limit in limits_of([model.config.get_text_config().to_dict()]) if limit < longest]
    beyond = min(max([_SHORT, *limits]) + _BEYOND, longest)
    rope = length_rope(model.config)
    wanted = {min(_SHORT, longest), beyond, *([] if rope is None else [min(rope.unchanged, longest)])}
    affordable = min(_MOST_TOKENS, _WORK / max(1, model.num_parameters()))
    run = sorted(length for length in wanted if length <= affordable)
    return run or [min(wanted)], None if beyond in run else beyond


def _ids(model: PreTrainedModel, length: int) -> npt.NDArray[np.int64]:
    rows: int = model.config.get_text_config().vocab_size
    return np.random.default_rng(length).integers(0, rows, length)


def _by_torch(model: PreTrainedModel, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    row = torch.tensor(ids[None])
    with torch.no_grad(), tracing.quiet():
        made: Any = model(input_ids=row, attention_mask=torch.ones_like(row))
    logits: npt.NDArray[np.float32] = made.logits[0].numpy()
    return logits


def _by_graph(session: Session, ids: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.float32]]:
    """Logits of a text that is read but for its last tokens, which follow one by one."""
    names = [value.name for value in session.get_outputs()]
    past: dict[str, Any] = {}
    start = 0
    for end in (len(ids) - _STEPS, *range(len(ids) - _STEPS + 1, len(ids) + 1)):
        feeds = plain_feeds(session, ids[start:end]) | past
        if "position_ids" in feeds:
            feeds["position_ids"] = np.arange(start, end, dtype=np.int64)[None]
        feeds["attention_mask"] = np.ones((1, end), np.int64)
        made = dict(zip(names, session.run(names, feeds), strict=True))
        past = {name.replace(PRESENT, PAST): value for name, value in made.items() if PRESENT in name}
        yield np.asarray(made["logits"][0], np.float32)
        start = end
