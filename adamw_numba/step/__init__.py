"""One step of an optimizer: its gradients, its preparation, its commit."""
