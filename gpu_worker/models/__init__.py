"""Models: the lean Llama-family decoder, the transformers backend, and what loads them."""
