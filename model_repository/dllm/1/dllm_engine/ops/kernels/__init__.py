"""Kernels in the Triton language; `ops` has a torch implementation of each.

`ops.dispatch` imports them only if it chooses them, so the package `triton` stays optional.
"""
