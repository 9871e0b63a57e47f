"""The vocab map: which token id is which compact id, and why it is kept."""
