"""Folders for other runtimes: a tokenizer cut to the compact vocab, or a graph that takes token ids.

`closure` finds the ids that a cut tokenizer needs, `tokenizer_cut` writes it, `segmentation` says how texts
fare; `remap` makes the drop-in graph. docs/layouts.md says when to use which.
"""
