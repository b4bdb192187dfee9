"""What kernels are written with: `Kernel`, vectors and memory, polynomials, work stealing, AMX."""
