"""Exported programs: capture, literals and loading."""
