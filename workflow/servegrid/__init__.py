"""What can these GPUs serve? Deployments, loads, cells, and what was measured in them."""

__version__ = "0.1.0"
