"""Run unstructured zeros faster than dense on an ordinary CPU: kernels, layers that use them, and what to choose."""
