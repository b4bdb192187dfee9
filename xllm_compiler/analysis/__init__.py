"""Facts about functions that passes ask for. Public names live in the modules."""
