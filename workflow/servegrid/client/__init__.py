"""The load client: sends a workload to an OpenAI-compatible endpoint and times the responses."""

from servegrid.client.measure import Measurement, measure

__all__ = ["Measurement", "measure"]
