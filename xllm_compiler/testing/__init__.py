"""Helpers for people who test passes; see `xir`."""
