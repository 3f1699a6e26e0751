"""What changes a model: masks applied, units cut, rows permuted, optimizers carried along."""
