"""Arrays on the host: the plan of a step, its compiled kernels, and the threads that share them."""
