"""Benchmarks and performance guards; installed as ``deq.bench``."""
