"""How far decode may be split over its keys: what kernels keep to, and memory is predicted from."""

MAX_SPLITS = 32
"""Of a list: splits of equal length, over fp8 rows parts of any."""
PARTIAL_ROWS = 2**15
"""Rows of fp32 partial results that splitting takes at most: it ends where the GPU is full."""
