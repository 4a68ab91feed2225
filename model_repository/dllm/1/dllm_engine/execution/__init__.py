"""Runs the model: devices, one rank or several, recorded CUDA graphs."""
