"""Hyperparameters: what each may be, and which variables have some of their own."""
