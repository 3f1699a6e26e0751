"""The choice of a kernel for each layer by measurements on this machine."""
