"""Selection: which token ids a profile's vocab keeps."""

from typing import TYPE_CHECKING

from trimserve.faces import lazy_face

if TYPE_CHECKING:
    from trimserve.selection.select_ids import count_reasons as count_reasons
    from trimserve.selection.select_ids import select as select

__getattr__, __dir__, __all__ = lazy_face(
    __name__,
    {
        "count_reasons": "trimserve.selection.select_ids",
        "select": "trimserve.selection.select_ids",
    },
)
