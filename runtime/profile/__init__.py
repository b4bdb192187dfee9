"""What the kernels of a step take: recording, the table, the trace. Nothing here is loaded unless somebody asks."""
