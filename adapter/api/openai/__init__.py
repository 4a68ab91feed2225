"""OpenAI-compatible API: requests, responses and errors in OpenAI's format."""
