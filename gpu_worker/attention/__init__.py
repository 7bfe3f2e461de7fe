"""Paged attention: the interface and its backends."""
