"""Stores jobs, claims them, runs them on an engine, records their outcome."""
