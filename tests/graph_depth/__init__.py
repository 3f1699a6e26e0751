"""Residual blocks: found from the data flow, cut out of their lists, exact against a bypass written here."""
