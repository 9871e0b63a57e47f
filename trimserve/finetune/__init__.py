"""Fine-tune with the kept rows alone, and give the full model back.

The memory that an embedding costs while it is trained is four times its own: the rows, their gradient and
Adam's two moments. Here only the kept rows are trained; the others wait in a file.

Needs torch and transformers (the `[finetune]` extra), imported when the first model is cut; `restore` needs
neither.

Example:
    >>> from trimserve.finetune import partial_vocab
    >>> with partial_vocab(model, vocab) as compact:  # doctest: +SKIP
    ...     Trainer(model, data_collator=compact.collator(padding), ...).train()
    >>> model.save_pretrained("tuned")  # doctest: +SKIP
"""

from trimserve.finetune.batch import Collator, remap
from trimserve.finetune.partial import PartialVocab, cut_vocab, partial_vocab
from trimserve.finetune.restore import Restored, is_compact, restore
from trimserve.finetune.texts import Outside, find_outside, grow

__all__ = [
    "Collator",
    "Outside",
    "PartialVocab",
    "Restored",
    "cut_vocab",
    "find_outside",
    "grow",
    "is_compact",
    "partial_vocab",
    "remap",
    "restore",
]
