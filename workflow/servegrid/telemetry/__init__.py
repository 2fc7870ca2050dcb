"""What is sampled while a load runs: GPUs, engine processes and the server's own metrics."""
