"""Applies a profile at inference: the merged cache, its masks and its attention. Imports torch and transformers only."""
