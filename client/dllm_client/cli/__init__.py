"""The commands of `dllm` that ask a service. `launcher/program.py` puts the program together."""
