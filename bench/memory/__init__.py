"""Where the memory of a generator goes."""
