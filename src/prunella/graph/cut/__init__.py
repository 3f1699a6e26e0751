"""Cutting a module by kept positions."""
