"""xllm-compiler: compiles Hugging Face checkpoints into artifacts and serves them. Imports nothing heavy."""

__version__ = "0.1.0"
