"""Time, memory and multiply-adds of a model on this machine."""
