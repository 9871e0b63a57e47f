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

from typing import TYPE_CHECKING

from trimserve.faces import lazy_face

if TYPE_CHECKING:
    from trimserve.finetune.restoring import Restored as Restored
    from trimserve.finetune.restoring import is_compact as is_compact
    from trimserve.finetune.restoring import restore as restore
    from trimserve.finetune.texts import Outside as Outside
    from trimserve.finetune.texts import find_outside as find_outside
    from trimserve.finetune.texts import grow as grow
    from trimserve_export.finetune.batch import Collator as Collator
    from trimserve_export.finetune.batch import remap as remap
    from trimserve_export.finetune.partial import PartialVocab as PartialVocab
    from trimserve_export.finetune.partial import cut_vocab as cut_vocab
    from trimserve_export.finetune.partial import partial_vocab as partial_vocab
    from trimserve_export.finetune.reversible.reversible import Reversible as Reversible
    from trimserve_export.finetune.reversible.reversible import load_reversible as load_reversible
    from trimserve_export.finetune.reversible.reversible import make_reversible as make_reversible
    from trimserve_export.finetune.reversible.reversible import reversible as reversible

__getattr__, __dir__, __all__ = lazy_face(
    __name__,
    {
        "Collator": "trimserve_export.finetune.batch",
        "Outside": "trimserve.finetune.texts",
        "PartialVocab": "trimserve_export.finetune.partial",
        "Restored": "trimserve.finetune.restoring",
        "Reversible": "trimserve_export.finetune.reversible.reversible",
        "cut_vocab": "trimserve_export.finetune.partial",
        "find_outside": "trimserve.finetune.texts",
        "grow": "trimserve.finetune.texts",
        "is_compact": "trimserve.finetune.restoring",
        "load_reversible": "trimserve_export.finetune.reversible.reversible",
        "make_reversible": "trimserve_export.finetune.reversible.reversible",
        "partial_vocab": "trimserve_export.finetune.partial",
        "remap": "trimserve_export.finetune.batch",
        "restore": "trimserve.finetune.restoring",
        "reversible": "trimserve_export.finetune.reversible.reversible",
    },
)
