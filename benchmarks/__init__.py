"""Measurements side by side; start with `python -m benchmarks.compare`."""
