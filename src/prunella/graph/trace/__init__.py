"""One recorded forward pass: operations, sizes and source lines."""
