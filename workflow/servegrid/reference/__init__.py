"""Published data and shapes of models and GPUs, with their sources; a roofline model."""
