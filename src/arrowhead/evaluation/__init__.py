"""Metrics, calibration and novelty: pure functions of predictions and features."""
