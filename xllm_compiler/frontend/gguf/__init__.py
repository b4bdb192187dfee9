"""Checkpoints in one GGUF file, as llama.cpp has them."""
