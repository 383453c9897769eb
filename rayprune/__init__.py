"""rayprune: structured pruning of large language models, spread over a Ray cluster."""
