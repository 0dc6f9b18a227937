"""Side-by-side measurements; `python -m benchmarks.compare` is where to begin."""
