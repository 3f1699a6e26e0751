"""The coupling graph of a model: which slices of which parameters go together, and the oracle of every cut."""
