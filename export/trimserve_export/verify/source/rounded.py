"""How far rounded weights move a model's results: measured against the source in fp32, not judged."""

import numpy as np
import numpy.typing as npt

from trimserve.arrays import Floats
from trimserve.files.quantized import Quantization
from trimserve.folder.tasks import EMBEDDING_TASK
from trimserve_export.verify.source.encoders import cosine
from trimserve_export.verify.source.sides import Part, Sides
from trimserve_export.verify.texts import HOSTILE


def measure(sides: Sides) -> Part:
    """Nats a token, or the cosine of embeddings, on texts that are not hostile."""
    manifest = sides.context.folder.manifest
    scheme = Quantization.from_dict(manifest.quantization)
    what = f"{manifest.dtype} weights" if scheme is None else f"weights of {scheme.body.bits} bits"
    texts = [text for text in sides.texts if text not in HOSTILE] or sides.texts
    if sides.original.is_sentence_encoder and sides.is_runtime:
        expected, found = sides.original.embeddings(texts), np.asarray(sides.runtime.encode(texts))
        values = [cosine(one, other) for one, other in zip(expected, found, strict=True)]
        unit = "cosine of embeddings"
    else:
        values = [value for text in texts for value in _of_text(sides, text)]
        unit = "cosine of states" if manifest.task == EMBEDDING_TASK else "nats a token (KL from fp32)"
    extreme = max(values) if "nats" in unit else min(values)
    note = (
        f"{what} give a mean of {np.mean(values):.4g} {unit}, at worst {extreme:.4g}, on {len(texts)} texts"
    )
    return Part(f"{note}, on {len(texts)} texts; what rounding does is measured, not judged")


def _of_text(sides: Sides, text: str) -> list[float]:
    """The measure at each position, by the full graph, which the trimmed one equals bit for bit."""
    ids = sides.encode(text)
    if ids is None or not len(ids):
        return []
    ids, full = ids[: sides.context.max_tokens], sides.context.full
    expected = np.atleast_2d(sides.original.outputs(ids.tolist(), start_id=sides.start_id))
    made = full.run(ids)
    found = np.atleast_2d((made["logits"] if "logits" in made else made["last_hidden_state"])[0])
    if sides.context.folder.manifest.task == EMBEDDING_TASK:
        return [cosine(one, other) for one, other in zip(expected, found, strict=True)]
    divergences: list[float] = _divergence(expected, found).tolist()
    return divergences


def _divergence(expected: Floats, found: Floats) -> npt.NDArray[np.float64]:
    """KL(fp32 || rounded) of each row, in nats."""
    theirs, ours = _log_softmax(expected), _log_softmax(found)
    result: npt.NDArray[np.float64] = (np.exp(theirs) * (theirs - ours)).sum(axis=-1)
    return result


def _log_softmax(logits: Floats) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: npt.NDArray[np.float64] = wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return result
