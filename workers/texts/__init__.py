"""Texts in the forms people have them in: files, forms, fields, chats. Torch in `checks` alone."""
