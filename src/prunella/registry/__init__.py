"""The catalogue of methods: how one is registered, found and written as plain data."""
