"""Trainings: the loop, what it minimises, adapters, one rank, one layer."""
