"""Rounds weights by what a calibration text sends through them: a phase of a compile with --quantize."""
