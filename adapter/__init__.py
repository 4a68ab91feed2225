"""The REST API of dLLM-Serve: keeps jobs, and has Triton run them."""
