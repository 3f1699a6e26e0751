"""The compiled library of sparse kernels, and its calls."""
