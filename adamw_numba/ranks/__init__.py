"""Processes that decide together: what is asked of an engine, mpi4py and torch.distributed, and the agreement."""
