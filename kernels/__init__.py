"""Triton kernels of the engine, one kernel idea a file; installed as ``deq.kernels``."""
