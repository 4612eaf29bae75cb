"""Calibration: a model reads samples, and what its heads lose is measured."""
