"""The frontend process, the client SDK, the offline engine and the command line.

Imports ``protocol`` only; never torch, never transformers.
"""
