"""Profiles: the counts of a corpus, merged, compared, and what they say of text to come."""
