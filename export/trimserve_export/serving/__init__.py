"""The passes that make an exported graph servable, one a module; `servable` runs them."""
