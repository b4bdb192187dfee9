"""What a compiled function takes and gives: its interface, its argument block, and the arrays of one call. Data only,
so that compiler and runtime can share it; must not know the IR, files or kernels."""
