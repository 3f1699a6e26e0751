"""Whole jobs: a run from request to report, verification, the machine check, and the demo."""
