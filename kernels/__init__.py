"""Triton kernels of diffupose, one op per file; importing this package needs no Triton, importing a kernel does."""
