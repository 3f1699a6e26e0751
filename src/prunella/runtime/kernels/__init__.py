"""The native library of sparse kernels and its calls."""
