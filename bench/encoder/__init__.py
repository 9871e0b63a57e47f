"""Encoders, full and trimmed: memory, time, equality."""
