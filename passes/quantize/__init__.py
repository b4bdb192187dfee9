"""Passes that trade precision for bytes and operations."""
