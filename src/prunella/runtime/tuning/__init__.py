"""Which kernel runs each layer on this machine, chosen by measurement."""
