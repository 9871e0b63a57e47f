"""From what the user names to a model as libraries load it: adapters merged, wrappers off, refused early."""
