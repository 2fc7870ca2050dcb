"""What is sampled while trials run: the engine's processes, the GPUs and the server's metrics."""
