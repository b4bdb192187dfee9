"""Passes that decide where bytes live."""
