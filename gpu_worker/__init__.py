"""The worker process: weights, KV memory, forward pass and sampling.  The only package with torch."""
