"""Parts of examples/bench_inference.py: the models, the runtimes, and the process of each."""
