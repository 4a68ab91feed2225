"""Serve the adapter: `python -m adapter`, with uvicorn's options.

It is `uvicorn adapter.app:app` with limits on connections, without WebSockets, which have none, and
with a JSON log of all its processes.
"""

import sys
from contextlib import suppress

from uvicorn.main import main as uvicorn

from adapter.errors import SettingsError
from adapter.settings import load_settings
from adapter.telemetry.logs import uvicorn_log_config


def main() -> None:
    """Run uvicorn with the adapter's application and its protocol."""
    context = uvicorn.make_context("python -m adapter", ["adapter.app:app", *sys.argv[1:]])
    context.params |= {"http": "adapter.connection:Connection", "ws": "none"}
    with suppress(SettingsError):  # the application reports it
        if context.params["log_config"] is None and load_settings().log_format == "json":
            context.params["log_config"] = uvicorn_log_config()
    with context:
        uvicorn.invoke(context)


if __name__ == "__main__":
    main()
