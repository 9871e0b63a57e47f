"""The report of a profile: its numbers, for a terminal, and as one HTML file."""
