"""The steps of a worker, by what they are for."""
