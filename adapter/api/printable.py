"""Makes text of a caller, such as a field's name, fit to be repeated in an error."""

#: Longest name of a field, and longest reason, that an error repeats.
MAX_NAME = 100
MAX_REASON = 1000


def printable(text: str, limit: int = MAX_REASON) -> str:
    """The text without lone surrogates, and cut at `limit` characters."""
    shown = text if len(text) <= limit else f"{text[:limit]}…"
    return shown.encode(errors="backslashreplace").decode()
