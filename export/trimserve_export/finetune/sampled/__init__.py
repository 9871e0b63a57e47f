"""Sampled weight gradients (WTA-CRS): linear layers that keep a part of their rows for backward."""
