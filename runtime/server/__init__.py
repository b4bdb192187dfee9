"""The OpenAI-compatible HTTP server. It imports errors, dims, artifact and runtime only; never torch or TVM."""
