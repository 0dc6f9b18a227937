"""Minimizing a function: options, one run, its loop in Python and compiled, many starts."""
