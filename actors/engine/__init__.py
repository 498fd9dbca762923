"""vLLM's engine, the thread that steps it, and what makes it faster on a CPU."""
