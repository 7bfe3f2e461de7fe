"""What every process agrees on: settings, messages, sockets, the run directory.

Imported by ``frontend``, ``core_proc``, ``gpu_worker`` and ``launch``; imports
none of them, and never torch.
"""
