"""The machine that a process runs on: processes, GPUs and installed software."""
