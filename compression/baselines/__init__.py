"""What others send instead of our codec: the comparison of `examples/bench_codec.py`.

Each method is one class with `encode(values, rng) -> bytes` and `decode(bytes, size) -> values`,
values float32 (size,). None adds headers, checks or a name of itself, so each is charged less than
it would be in use. Error feedback is the caller's, around any of them, as `compression.feedback`
is around ours.
"""
