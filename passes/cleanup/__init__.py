"""Passes that only simplify: they never need a target."""
