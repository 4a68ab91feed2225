"""Numerical building blocks: functions of tensors that know nothing of requests."""
