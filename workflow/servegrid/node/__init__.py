"""The machine that a process runs on: its processes, GPUs and software."""
