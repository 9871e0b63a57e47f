"""Counting the token ids of a corpus, over cores or a cluster."""
