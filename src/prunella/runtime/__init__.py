"""The sparse CPU runtime: kernels for weights with zeros, and the modules that run them."""
