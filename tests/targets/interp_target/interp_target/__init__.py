"""A target without code generation: a checkpoint becomes the text of its module, and the interpreter runs that."""
