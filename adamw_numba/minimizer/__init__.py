"""Minimizing a function: options, one run, its loop in Python or compiled, many starts, several processes."""
