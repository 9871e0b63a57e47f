"""Profiles made by hand."""

import numpy as np

from trimserve.profiles.profile import Profile


def make_profile(counts, sha="a" * 64, name="model", **options):
    counts = np.asarray(counts, np.int64)
    facts = {"texts": 1, "characters": 5, "beyond_rows": 0, "sources": ()} | options
    arrays = {"structural": np.array([0], np.int32), "padding_ids": np.array([], np.int32)} | options
    return Profile(counts, sha, name, **(facts | arrays))
