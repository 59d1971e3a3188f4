"""Figures of predictions and features: pure functions."""
