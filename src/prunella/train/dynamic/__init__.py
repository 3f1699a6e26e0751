"""Sparse training that drops and grows weights."""
