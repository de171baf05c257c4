"""Tasks, verifiers, peers and privileged contexts: everything before the first forward pass."""
