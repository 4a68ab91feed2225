"""The engine: its thread, its scheduler, and the checks at admission."""
