"""Passes that bring every spelling of an idea into one form."""
