"""Commands for those who change dLLM-Serve."""
