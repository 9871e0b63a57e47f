"""How fast models are trimmed, and in how much memory."""
