"""The HTTP API: routes, schemas and their errors."""
