"""Texts in the forms people have them in: files, forms, fields, chats. No torch but in `checks`."""
