"""From a job and a model to a plan: shapes, footprints, memory, arithmetic, time. Computes nothing
of the model.
"""
