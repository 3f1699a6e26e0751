"""Penalties and proximal steps that push whole units toward zero."""
