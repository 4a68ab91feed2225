"""Kernels in the Triton language; each has its equal in torch next door in `ops`.

Imported only where `ops.dispatch` chose them: a machine without the package `triton` never is.
"""
