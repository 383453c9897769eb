"""The living layers: the only room that touches modules of transformers, and the one that slices
weights.
"""
