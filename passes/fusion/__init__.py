"""Passes that put several ops into one, so that a step does fewer kernels and touches memory less."""
