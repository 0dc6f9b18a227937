"""Saved state: snapshots, restoring, checkpoints, and the stores they go to."""
