"""Forward and backward passes over the layers: sweep, stream, survey, gradients, divergence,
perplexity.
"""
