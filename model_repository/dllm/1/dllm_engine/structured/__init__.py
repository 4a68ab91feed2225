"""Structured outputs: automata over tokens, of JSON schemas, regular expressions and choices."""
