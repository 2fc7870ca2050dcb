"""From records to figures: metrics, validity, statistics, findings and the capacity plan."""
