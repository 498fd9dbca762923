"""Training with DeepSpeed on batches from the buffer."""
