"""The checks of `verify`, a group a module."""
