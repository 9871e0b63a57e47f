"""`partial_vocab`: a model with the kept rows alone while it is trained, the full model afterwards."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from trimserve.arguments import checked
from trimserve.arrays import Ids
from trimserve.errors import MismatchError, UsageError
from trimserve.model.source import ModelSource
from trimserve.vocab.map import VocabMap
from trimserve_export.finetune.batch import Batch, Collator, remap
from trimserve_export.finetune.cold_file import ColdFiles, put_rows, take_rows
from trimserve_export.finetune.ids import MovedIds
from trimserve_export.finetune.live import (
    LiveTensor,
    find_live_vocab,
    get_tensor,
    identical,
    replace_tensor,
    size_attributes,
)
from trimserve_export.finetune.loss import CutLoss, install_where_possible
from trimserve_export.finetune.optim import Replaced, check_state, replace_parameters
from trimserve_export.finetune.saving import CompactSaver, find_base

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class PartialVocab:
    """A model that is cut to a vocab; made by `cut_vocab` or `partial_vocab`.

    Attributes:
        model: the model that was passed, changed in place.
        vocab: the kept ids.
        has_head: the model gives logits over the vocab: labels are token ids, and are translated.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        vocab: VocabMap,
        *,
        base: str | Path | ModelSource | None,
        folder: Path | None,
    ) -> None:
        """Check the model and write its cold rows to disk; nothing is changed before `cut`."""
        self.model = model
        self.vocab = vocab
        self._live = find_live_vocab(model, vocab)
        self.has_head = self._live.has_head
        self._ids = MovedIds(model, vocab)
        self._sizes = size_attributes(model, self._live.tensors, vocab)
        self._optimizers: list[Optimizer] = []
        self._saver = CompactSaver(model, vocab, self._live, self._ids, find_base(model, base))
        self._hook: Any = None
        self._loss: CutLoss | None = None
        self._cold = ColdFiles(vocab.cold_ids, folder)
        for live in self._live.tensors:
            self._cold.put(live.names[0], get_tensor(model, live.names[0]), live.axis)

    @property
    def is_cut(self) -> bool:
        """Whether the model has the kept rows alone at present."""
        return self._hook is not None

    def cut(self, optimizers: "Sequence[Optimizer]" = ()) -> None:
        """Cut the model in place, and the state that optimizers hold for its rows."""
        old = {live: get_tensor(self.model, live.names[0]) for live in self._live.tensors}
        for live, tensor in old.items():
            if tensor.grad is not None:
                raise UsageError(
                    f"{live.names[0]} holds a gradient, which a cut would lose: step, or zero_grad(), first."
                )
        for optimizer in optimizers:
            check_state(optimizer, old.values())
        kept = {live: take_rows(tensor, self.vocab.kept_ids, live.axis) for live, tensor in old.items()}
        changes = [
            Replaced(live.names[0], live.axis, old[live], replace_tensor(self.model, live.names, kept[live]))
            for live in old
        ]
        for number, optimizer in enumerate(optimizers):
            replace_parameters(optimizer, changes, self._shrink(number))
            self._optimizers.append(optimizer)
        self._set_numbers(compact=True)

    def attach(self, optimizer: "Optimizer") -> None:
        """Let an optimizer that was made inside the block go on with the full model after it.

        Its state then gets zero rows for the ids that were not kept, as dense training would have left them.
        """
        self._optimizers.append(optimizer)

    def remap(self, batch: Batch) -> Batch:
        """Translate a batch's token ids: inputs, and labels where the model predicts tokens.

        Raises:
            UnknownIdError: an id is not in the vocab; see `batch.remap`.
        """
        return remap(batch, self.vocab, labels=self.has_head)

    def collator(self, inner: Callable[[Sequence[Mapping[str, Any]]], Batch]) -> Collator:
        """Wrap the data collator that pads, so that its batches hold compact ids."""
        return Collator(inner, self.vocab, self.has_head)

    def to_original(self, compact_ids: npt.ArrayLike) -> Ids:
        """Token ids, int32, of compact ids that the model generated.

        Raises:
            UnknownIdError: an id is outside 0..K-1.
        """
        return self.vocab.to_original(compact_ids)

    def restore(self) -> None:
        """Give the model all its rows back: the tuned kept ones, the others as they were, bit for bit.

        Rows go to the device and dtype that the kept ones have by then. Gradients are dropped. A second call
        does nothing.

        Raises:
            UsageError: adapters stand where the rows belong; merge or unload them and call this again.
            MismatchError: the embedding was resized in the block.
        """
        if not self.is_cut:
            return
        # Every name is looked up before anything is changed.
        parts = [(cut, live) for cut in self._live.tensors for live in identical(self.model, cut)]
        for _, live in parts:
            self._check_rows(live)
        changes = [self._give_back(cut, live) for cut, live in parts]
        for number, optimizer in enumerate(self._optimizers):
            replace_parameters(optimizer, changes, self._extend(number))
        self._optimizers.clear()
        self._set_numbers(compact=False)
        self._cold.close()

    def _give_back(self, cut: LiveTensor, live: LiveTensor) -> Replaced:
        tuned = get_tensor(self.model, live.names[0])
        full = self._full(cut.names[0], tuned, live.axis)
        return Replaced(cut.names[0], live.axis, tuned, replace_tensor(self.model, live.names, full))

    def _full(self, name: str, kept: "Tensor", axis: int) -> "Tensor":
        """A full tensor of kept rows and the cold rows of that name; zeros if there are none."""
        shape = (*kept.shape[:axis], self.vocab.vocab_size, *kept.shape[axis + 1 :])
        full = kept.detach().new_zeros(shape)
        if name in self._cold:
            self._cold.fill(name, full, axis)
        put_rows(full, self.vocab.kept_ids, axis, kept)
        return full

    def _check_rows(self, live: LiveTensor) -> None:
        rows = get_tensor(self.model, live.names[0]).shape[live.axis]
        if rows != len(self.vocab):
            raise MismatchError(
                f"{live.names[0]} should have {len(self.vocab):,} rows but has {rows:,}: it was resized in "
                "the block, so the full model cannot be restored; grow the vocab before the block instead."
            )

    def _shrink(self, number: int) -> "Callable[[str, Tensor, Replaced], Tensor]":
        def convert(key: str, value: "Tensor", change: Replaced) -> "Tensor":
            self._cold.put(_state_name(number, change.name, key), value, change.axis)
            return take_rows(value, self.vocab.kept_ids, change.axis)

        return convert

    def _extend(self, number: int) -> "Callable[[str, Tensor, Replaced], Tensor]":
        def convert(key: str, value: "Tensor", change: Replaced) -> "Tensor":
            return self._full(_state_name(number, change.name, key), value, change.axis)

        return convert

    def _set_numbers(self, *, compact: bool) -> None:
        for attribute in self._sizes:
            attribute.set(compact=compact)
        if compact:
            self._ids.apply()
            self._hook = self.model.register_forward_pre_hook(self._refresh_ids)
            object.__setattr__(self.model, "save_pretrained", self._saver)
            self._loss = install_where_possible(self.model) if self.has_head else None
        else:
            self._hook.remove()
            self._hook = None
            del self.model.__dict__["save_pretrained"]
            if self._loss is not None:
                self._loss.remove()
            self._ids.revert()

    def _refresh_ids(self, *_: object) -> None:
        import torch

        if not torch.compiler.is_compiling():
            self._ids.refresh()


def _state_name(number: int, name: str, key: str) -> str:
    return f"optimizer{number}.{name}.{key}"


@checked
def cut_vocab(
    model: "PreTrainedModel",
    vocab: VocabMap,
    *,
    optimizers: "Sequence[Optimizer]" = (),
    base: str | Path | ModelSource | None = None,
    folder: Path | None = None,
) -> PartialVocab:
    """Cut a model in place; `restore()` of what is returned gives the full model back.

    Embedding, head (tied or not), biases and `final_logits_bias` keep the rows of the kept ids, on their
    device, in their dtype, with their `requires_grad`. `vocab_size` and every token id in the model's configs
    become compact; assign token ids to them, they are translated. Checkpoints that `save_pretrained` writes
    meanwhile are compact; see `restore`. Where cut-cross-entropy is installed, decoders on a CUDA device
    train with it.

    Args:
        model: a transformers model, not wrapped: wrap it (DistributedDataParallel, PEFT, torch.compile)
            afterwards.
        vocab: the kept ids; they must cover the training texts (see `find_outside` and `grow`).
        optimizers: made before: their parameters and state follow. One made afterwards needs nothing;
            `attach` it if it should go on with the full model.
        base: the folder or hub id that the model was loaded from; by default what the model remembers. It is
            hashed into checkpoints.
        folder: where the cold rows wait in a file; the system's temporary folder by default.

    Raises:
        UsageError: the model is wrapped, has gradients, or an optimizer's state cannot be carried.
        UnsupportedModelError: a vocab tensor that is not understood, or a pad id that may not move.
        MismatchError: the vocab was made for another vocab size.
    """
    if "save_pretrained" in model.__dict__:
        raise UsageError(
            "the model is cut already, or reversible: restore it first, or open partial_vocab's block around "
            "the other one."
        )
    partial = PartialVocab(model, vocab, base=base, folder=folder)
    try:
        partial.cut(optimizers)
    except BaseException:
        partial.restore()
        raise
    logger.info("%s of %s rows are trained", f"{len(vocab):,}", f"{vocab.vocab_size:,}")
    return partial


@contextlib.contextmanager
@checked
def partial_vocab(
    model: "PreTrainedModel",
    vocab: VocabMap,
    *,
    optimizers: "Sequence[Optimizer]" = (),
    base: str | Path | ModelSource | None = None,
    folder: Path | None = None,
) -> Iterator[PartialVocab]:
    """Cut a model in place for a block; the full model is back when it ends, by an exception too.

    Args:
        model: see `cut_vocab`, as the others.
        vocab: see `cut_vocab`.
        optimizers: see `cut_vocab`.
        base: see `cut_vocab`.
        folder: see `cut_vocab`.

    Yields:
        What translates batches (`remap`, `collator`) and ids that the model generates (`to_original`).

    Raises:
        UsageError: see `cut_vocab` and `PartialVocab.restore`, as the others.
        UnsupportedModelError: see `cut_vocab`.
        MismatchError: see `cut_vocab`.
    """
    partial = cut_vocab(model, vocab, optimizers=optimizers, base=base, folder=folder)
    try:
        yield partial
    finally:
        partial.restore()
