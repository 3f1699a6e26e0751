"""Rewrites of a traced program: fusion, simplification and chains of layers."""
