"""What can these GPUs serve? Deployments, workloads, cells, and what was measured."""

__version__ = "0.1.0"
