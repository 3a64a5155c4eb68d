"""The codec benchmark: kinds of work, methods, runs and results. `bench_codec.py` is its door."""
