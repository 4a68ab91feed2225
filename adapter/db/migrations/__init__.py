"""How the schema came about: one file a change, applied in order at start."""
