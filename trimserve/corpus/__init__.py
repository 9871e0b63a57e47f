"""A corpus: files, rows and conversations as documents."""
