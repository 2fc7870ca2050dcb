"""What a study measures: its configuration, expanded to deployments, cells and trials."""
