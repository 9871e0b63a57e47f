"""Selection: which token ids a profile's vocab keeps."""
