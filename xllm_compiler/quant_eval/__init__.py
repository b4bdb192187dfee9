"""What a quantized model lost: measured on held-out text against the unquantized form, and choices made by it."""
