"""A trained classifier in one folder."""
