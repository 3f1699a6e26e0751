"""Functions that run, copy, guard or read a user's model."""
