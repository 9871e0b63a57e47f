"""A checkpoint: which of its tensors have a vocab axis, its compact configs, and cutting its rows."""
