"""The verbs as ordinary functions."""
