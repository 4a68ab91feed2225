"""Access: API keys, rate limits, and the middleware that applies both."""
