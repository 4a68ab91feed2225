"""Who may call: API keys, rates, and the middleware that applies both."""
