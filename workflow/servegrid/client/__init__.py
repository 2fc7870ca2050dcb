"""The load client: a load put on an OpenAI-compatible endpoint, and what came back when."""

from servegrid.client.measure import Measurement, measure

__all__ = ["Measurement", "measure"]
