"""Decoding: sampling, token rules, and the loop that turns drafts into tokens."""
