"""Serve the adapter: `python -m adapter`, with uvicorn's options.

It is `uvicorn adapter.app:app` with limits on connections, and without WebSockets, which have none.
"""

import sys

from uvicorn.main import main as uvicorn


def main() -> None:
    """Run uvicorn with the adapter's application and its protocol."""
    context = uvicorn.make_context("python -m adapter", ["adapter.app:app", *sys.argv[1:]])
    context.params |= {"http": "adapter.connection:Connection", "ws": "none"}
    with context:
        uvicorn.invoke(context)


if __name__ == "__main__":
    main()
