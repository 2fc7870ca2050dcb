"""From records to results: metrics, validity, statistics, findings and the capacity plan."""
