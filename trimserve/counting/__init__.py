"""Counting the token ids of a corpus, over the cores of a machine or a cluster."""

from typing import TYPE_CHECKING

from trimserve.faces import lazy_face

if TYPE_CHECKING:
    from trimserve.counting.count import Interrupted as Interrupted
    from trimserve.counting.count import Tally as Tally
    from trimserve.counting.count import count_corpus as count_corpus
    from trimserve.counting.plan import How as How
    from trimserve.counting.plan import Shard as Shard
    from trimserve.counting.plan import Where as Where

__getattr__, __dir__, __all__ = lazy_face(
    __name__,
    {
        "Where": "trimserve.counting.plan",
        "How": "trimserve.counting.plan",
        "Interrupted": "trimserve.counting.count",
        "Shard": "trimserve.counting.plan",
        "Tally": "trimserve.counting.count",
        "count_corpus": "trimserve.counting.count",
    },
)
