"""Arrays on a GPU: the plan of a step, its kernels, and what the device holds."""
