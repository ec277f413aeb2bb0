"""What runs on Ray: data, model, training loop, checkpoints. Speaks to the control plane through the bucket alone."""
