"""The benchmark of mutual enhancement, in parts; `examples/bench_learning.py` runs it."""
