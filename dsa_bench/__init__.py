"""Benchmarks and profiles of complete DeepSeek Sparse Attention against dense attention."""

__version__ = "0.1.0"
