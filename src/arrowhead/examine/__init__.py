"""Figures of training runs and scores."""
