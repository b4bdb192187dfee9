"""Measures what quantization loses, on held-out text, and chooses forms by it."""
