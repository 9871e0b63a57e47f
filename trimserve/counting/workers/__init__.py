"""Where slices of a corpus are counted: processes of this machine, or Ray."""
