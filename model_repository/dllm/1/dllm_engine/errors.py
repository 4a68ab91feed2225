"""The errors of this package, in one small tree.

DllmError
├── InvalidRequest   a field of the request is invalid; names field and limit
├── InvalidConfig    the engine cannot be started with these settings
├── CheckpointError  the checkpoint is incomplete, malformed or of an unknown family
├── QueueFull        the queue is full
├── RequestFailed    one request failed inside the engine
│   └── NotStarted       … before it started, through no fault of its own
│       └── QueueTimeout it waited longer than its timeout
└── EngineDead       the engine stopped; no request is answered any more
"""


class DllmError(Exception):
    """Base of every error this package raises on purpose."""


class InvalidRequest(DllmError, ValueError):
    """A request field is unusable. `str()` is ``"<field>: <what is wrong and the limit>"``."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class InvalidConfig(DllmError, ValueError):
    """An engine setting is unusable; the message names it."""


class CheckpointError(DllmError):
    """The checkpoint directory cannot be served; the message names file, key or tensor."""


class RequestFailed(DllmError):
    """One request failed while running."""


class QueueFull(DllmError):
    """The queue is full; the message names the setting."""


class NotStarted(RequestFailed):
    """A request ended before it started, through no fault of its own: send it again."""


class QueueTimeout(NotStarted):
    """A request waited longer for a slot than its own timeout."""


class EngineDead(DllmError):
    """The engine has stopped; no request is answered any more."""
