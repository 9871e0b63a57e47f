"""What a graph must take and give so that this runtime can run it: one rule, for export and loading.

A graph of another tool that breaks it would export and fail, or be wrong, at the first text.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from trimserve.folder.tasks import GENERATION_TASK, TEXT2TEXT_TASK
from trimserve.runtime.cold_rows import COLD_INPUT
from trimserve.runtime.session import Session

PAST, PRESENT = "past_key_values.", "present."
# Inputs of a past that belong to the source text of an encoder-decoder.
CROSS = ".encoder."
_KV_RANK = 4
# Of a past: a convolution's last inputs (B, channels, n), and what linear attention sums up (B, H, K, V).
_STATES = (".conv", ".recurrent")
# What the serving passes add.
_ADDED = frozenset({COLD_INPUT, "logits_to_keep"})
_KV_DTYPES = ("float", "float16")
# What the graph of each task gives; the first that is there is read.
RESULTS: dict[str, tuple[str, ...]] = {
    "feature-extraction": ("last_hidden_state", "sentence_embedding"),
    "fill-mask": ("logits",),
    "text-classification": ("logits",),
    "token-classification": ("logits",),
}


def is_state(name: str) -> bool:
    """Whether a part of the past is a state of a fixed size, not keys or values of all tokens so far."""
    return name.endswith(_STATES)


def empty_shape(name: str, shape: Sequence[int | str | None], batch: int) -> tuple[int, ...]:
    """The shape of a part of the past before the first token.

    Args:
        name: of the graph's input.
        shape: of the input; all sizes but those of batch and past are numbers.
        batch: B.
    """
    length = shape[2] if is_state(name) else 0
    sizes = (*shape[1:2], length, *shape[3:])
    return (batch, *(size for size in sizes if isinstance(size, int)))


class Port(NamedTuple):
    """An input of a graph: dtype in ONNX's words (``"int64"``), and its axes, numbers or names, if known."""

    dtype: str
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True, slots=True)
class Contract:
    """What a graph may take, must take and must give.

    Attributes:
        takes: inputs (B, T) that the runtime feeds, beside the past.
        needs: those of them that it counts on.
        gives: outputs that it reads; one of each group has to be there.
        dtypes: of the inputs.
        has_past: it takes a past, and gives a present for each part of it.
    """

    takes: frozenset[str]
    needs: frozenset[str]
    gives: tuple[tuple[str, ...], ...] = ()
    dtypes: tuple[str, ...] = ("int64",)
    has_past: bool = False

    def fault(self, inputs: Mapping[str, Port], outputs: Collection[str]) -> str | None:
        """Say how a graph breaks the contract, as the end of a sentence about it; None where it keeps it.

        Args:
            inputs: its inputs without those that have a default.
            outputs: the names of its outputs.
        """
        past = [name for name in inputs if name.startswith(PAST)] if self.has_past else []
        if missing := sorted(self.needs - inputs.keys()):
            return f"lacks the input {', '.join(missing)} (it has {', '.join(inputs)})"
        if unknown := [name for name in inputs if name not in self.takes and name not in past]:
            return f"takes {', '.join(unknown)}, which the runtime does not feed"
        own = [name for name in past if CROSS not in name]
        if self.has_past and not own:
            return "takes no past_key_values, so each token would cost all tokens before it"
        wanted = (*self.gives, *((name.replace(PAST, PRESENT),) for name in own))
        if lacking := [group[0] for group in wanted if not set(group) & set(outputs)]:
            return f"lacks the output {', '.join(lacking)} (it has {', '.join(outputs)})"
        return next(
            filter(None, (self._misfit(name, port, name in past) for name, port in inputs.items())), None
        )

    def _misfit(self, name: str, port: Port, is_past: bool) -> str | None:
        dtypes, rank = (_KV_DTYPES, _KV_RANK) if is_past else (self.dtypes, 2)
        if port.dtype not in dtypes:
            return f"takes {name} as {port.dtype}, which the runtime feeds as {' or '.join(dtypes)}"
        if port.shape is None:
            return None
        if is_past and is_state(name):
            if all(isinstance(size, int) for size in port.shape[1:]):
                return None
            return f"takes {name} without numbers in its shape"
        if len(port.shape) != rank:
            return f"takes {name} with {len(port.shape)} axes, which the runtime feeds with {rank}"
        if is_past and not (isinstance(port.shape[1], int) and isinstance(port.shape[3], int)):
            return f"takes {name} without a number of heads and their size in its shape"
        return None


_TEXT = frozenset({"input_ids", "attention_mask", "token_type_ids", "position_ids"})


def contract_of(task: str, role: str = "model") -> Contract:
    """The contract of an exporter's graph, before the serving passes.

    Args:
        task: a task that the runtime runs.
        role: ``"model"``, or ``"encoder"`` or ``"decoder"`` of an encoder-decoder.
    """
    if task == GENERATION_TASK:
        takes = _TEXT - {"token_type_ids"}
        return Contract(takes, takes - {"position_ids"}, (("logits",),), has_past=True)
    if task == TEXT2TEXT_TASK and role == "encoder":
        needs = frozenset({"input_ids", "attention_mask"})
        return Contract(needs, needs, (("last_hidden_state",),))
    if task == TEXT2TEXT_TASK:
        needs = frozenset({"input_ids", "encoder_attention_mask"})
        return Contract(needs | {"attention_mask", "position_ids"}, needs, (("logits",),), has_past=True)
    # Without a mask, texts of one length are fed together.
    gives = (RESULTS[task],) if task in RESULTS else ()
    return Contract(_TEXT, frozenset({"input_ids"}), gives, dtypes=("int64", "int32"))


def served_fault(session: Session, task: str, role: str = "model") -> str | None:
    """Say how a graph that was made for serving breaks its contract; None where it keeps it.

    Args:
        session: an opened graph.
        task: see `contract_of`.
        role: see `contract_of`.
    """
    inputs = {
        value.name: Port(value.type.removeprefix("tensor(").removesuffix(")"), tuple(value.shape))
        for value in session.get_inputs()
        if value.name.partition(".")[0] not in _ADDED
    }
    outputs = [value.name for value in session.get_outputs()]
    contract = contract_of(task, role)
    if role == "encoder":  # it gives the cross-attention's keys and values instead
        contract = replace(contract, gives=())
    return contract.fault(inputs, outputs)
