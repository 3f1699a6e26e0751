"""Which kernel runs each layer on this machine, by measurement."""
