"""Profiles: the counts of a corpus, merged, compared, and what they say of text to come."""

from typing import TYPE_CHECKING

from trimserve.faces import lazy_face

if TYPE_CHECKING:
    from trimserve.profiles.difference import Difference as Difference
    from trimserve.profiles.difference import diff as diff
    from trimserve.profiles.merging import merge as merge
    from trimserve.profiles.profile import Profile as Profile
    from trimserve.profiles.profiling import ProfileInterrupted as ProfileInterrupted
    from trimserve.profiles.profiling import ProfileOptions as ProfileOptions

__getattr__, __dir__, __all__ = lazy_face(
    __name__,
    {
        "Difference": "trimserve.profiles.difference",
        "Profile": "trimserve.profiles.profile",
        "ProfileInterrupted": "trimserve.profiles.profiling",
        "ProfileOptions": "trimserve.profiles.profiling",
        "diff": "trimserve.profiles.difference",
        "merge": "trimserve.profiles.merging",
    },
)
