"""Passes that decide when and on which stream ops run. Public names live in the modules."""
