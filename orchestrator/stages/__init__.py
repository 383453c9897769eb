"""The stages of a job, from tokens to the exported model."""
