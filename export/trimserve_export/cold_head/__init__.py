"""The graphs and files beside a generator that compute the logits of its cold ids."""
