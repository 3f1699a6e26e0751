"""Learned gates and thresholds, and how they are merged into the weights."""
