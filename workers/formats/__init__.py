"""An exported model in the forms that other engines read: one module for each, which reads the
folder as anybody would.
"""
