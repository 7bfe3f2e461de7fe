"""Own kernels for the CPU: C++ with a plain C ABI, compiled at the first start, loaded with ctypes.

Every kernel is a few loops whose units the threads of a team share (``team.h``); ``build.py`` makes
the library for the instructions that this CPU has, ``library.py`` loads it.  Where it cannot be
had, plain torch computes the same more slowly.
"""
