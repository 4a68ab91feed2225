"""Tensor parallelism: splits one model over several processes (ranks) with a device each."""
