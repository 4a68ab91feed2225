"""Chooses tokens: candidates at the masked positions, then the ones that a rule commits."""
