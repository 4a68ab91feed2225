"""Start NVIDIA Triton Inference Server and the REST adapter together on one host.

Knows processes, ports and logs. Knows nothing of the engine and nothing of the adapter beyond
the command that starts it.
"""
