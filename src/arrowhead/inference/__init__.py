"""Scores images with a bundle, evaluates it, and serves it."""
