"""The mathematics: products, factorisations, statistics, methods, corrections. Knows no model and
no run folder.
"""
