"""Studies: the configuration, expanded to deployments, cells and trials."""
