"""Commands without a job: text that a model writes, measurements of layers and machines."""
