"""Penalties and proximal steps that make coupled units small or exactly zero."""
