"""Kernels in portable Triton, with matrix products through torch. `kernels.TritonKernels` is the entry."""
