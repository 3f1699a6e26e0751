"""Many runs against each other: Pareto experiments and comparisons of methods."""
