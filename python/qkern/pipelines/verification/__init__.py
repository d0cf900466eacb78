"""What `qkern.verify` is made of: readers of its own, and the checks."""
