"""Whatever runs, copies, guards or reads a user's model."""
