"""The model as data: its families, its files, its config. No torch; the only reader of config
keys.
"""
