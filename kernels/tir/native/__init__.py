"""From kernels to shared libraries: objects, their store, linking, the team of threads, a kernel run alone."""
