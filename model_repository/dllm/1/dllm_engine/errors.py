"""What can go wrong, in one small tree.

DllmError
├── InvalidRequest   the request asks for something that cannot be done; names field and limit
├── InvalidConfig    the engine cannot be started with these settings
├── CheckpointError  the checkpoint is incomplete, malformed or of an unknown family
├── QueueFull        the engine lets no more requests wait
├── RequestFailed    one request met an error inside the engine
│   └── NotStarted           … before it began, for no fault of its own
│       └── QueueTimeout it waited for longer than it was willing to
└── EngineDead       the engine stopped; nothing more will be answered
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
    """The engine met an error while running one request."""


class QueueFull(DllmError):
    """As many requests wait as may; the message names the setting."""


class NotStarted(RequestFailed):
    """A request ended before it began, for no fault of its own: it may be made again."""


class QueueTimeout(NotStarted):
    """A request waited for a place for longer than its own timeout."""


class EngineDead(DllmError):
    """The engine has stopped and answers nothing more."""
