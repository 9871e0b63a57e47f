"""The check against the source: the original folder in its own library, beside the trimmed one."""
