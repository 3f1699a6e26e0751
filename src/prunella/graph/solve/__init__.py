"""From a recorded pass to groups of coupled units."""
