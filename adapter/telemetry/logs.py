"""Structured log: events with fields, as text or as JSON lines.

Fields and tracebacks never hold prompts, generated text or keys.
"""

import json
import logging
import select
import sys
from typing import Any, cast

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

NAME = "adapter"
#: Workers share a pipe, which keeps a line whole up to this many bytes.
MAX_LINE_BYTES = select.PIPE_BUF
#: Characters of a text that is not shortened.
SHORT_TEXT = 100


def _component(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    event.pop("color_message", None)  # uvicorn's message again, with colors
    return event


SHARED: list[Processor] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    _component,
]

structlog.configure(
    processors=[
        structlog.stdlib.filter_by_level,
        *SHARED,
        structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
    ],
    logger_factory=structlog.stdlib.LoggerFactory(),
    wrapper_class=structlog.stdlib.BoundLogger,
    cache_logger_on_first_use=True,
)


def get_logger() -> FilteringBoundLogger:
    """The adapter's logger: `log.info("job_settled", job=3)`."""
    return cast(FilteringBoundLogger, structlog.stdlib.get_logger(NAME))


def configure_logging(level: str, kind: str) -> None:
    """Write the adapter's log to stderr, and with `json` uvicorn's too.

    If the logger has handlers already, they are kept.
    """
    ours = logging.getLogger(NAME)
    ours.setLevel(level)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter(kind))
    if not ours.hasHandlers():
        ours.addHandler(handler)
        # The adapter logs every call itself, with more fields.
        logging.getLogger("uvicorn.access").disabled = True
    if kind == "json":
        for name in ("uvicorn", "uvicorn.error"):
            theirs = logging.getLogger(name)
            theirs.handlers, theirs.propagate = [handler], False


def uvicorn_log_config() -> dict[str, Any]:
    """A `log_config` for uvicorn, whose supervisor of workers then writes JSON lines too."""
    stderr = "ext://sys.stderr"
    handler = {"class": "logging.StreamHandler", "formatter": "json", "stream": stderr}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": "adapter.telemetry.logs.formatter", "kind": "json"}},
        "handlers": {"stderr": handler},
        "loggers": {"uvicorn": {"handlers": ["stderr"], "level": "INFO", "propagate": False}},
    }


def _json_line(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    """One JSON object; its longest texts lose their beginnings until the line fits."""
    while len(line := json.dumps(event, default=repr)) >= MAX_LINE_BYTES:
        texts = {name: value for name, value in event.items() if isinstance(value, str)}
        longest = max(texts, key=lambda name: len(texts[name]))
        if len(text := texts[longest]) > SHORT_TEXT:
            event[longest] = "…" + text[len(text) // 2 + 1 :]
        else:
            event = {name: event[name] for name in ("timestamp", "level", "event")}
    return line


def formatter(kind: str) -> logging.Formatter:
    """The formatter of lines of text, or of JSON lines (`json`)."""
    processors: list[Processor] = [structlog.stdlib.ProcessorFormatter.remove_processors_meta]
    if kind == "json":
        processors += [structlog.processors.format_exc_info, _json_line]
    else:
        # The default shows values of variables, such as prompts, and takes seconds.
        plain = structlog.dev.plain_traceback
        console = structlog.dev.ConsoleRenderer(
            colors=False, pad_event_to=0, exception_formatter=plain
        )
        processors += [console]
    return structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=[*SHARED, structlog.stdlib.ExtraAdder()], processors=processors
    )
