"""Engines that a model is tried in, each where it is installed: one module for each, found by its
name.
"""
