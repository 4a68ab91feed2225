"""What can go wrong while starting the stack.

LaunchError
 ├─ ServerMissingError  no tritonserver binary that fits this interpreter
 ├─ RepositoryError     the model repository, or a model in it, is not there
 ├─ CheckpointError     MODEL_PATH is no checkpoint that can be served
 ├─ SettingError        a part refuses a setting
 ├─ PortTakenError      another process listens on a port we need
 ├─ ProcessDiedError    a process ended on its own
 └─ StartTimeoutError   a process lives but is not ready in time
"""

from collections.abc import Sequence


class LaunchError(Exception):
    """Base of every error of the launcher; the message is for the person who started it."""


class ServerMissingError(LaunchError):
    """There is no tritonserver to run."""


class RepositoryError(LaunchError):
    """The model repository does not hold the models that are to be loaded."""


class CheckpointError(LaunchError):
    """MODEL_PATH is no checkpoint that can be served; says what is missing and what to do."""


class SettingError(LaunchError):
    """A part refuses the value of a setting; names the variable, the value and what it may be."""


class PortTakenError(LaunchError):
    """A port is in use; names the port and the setting that moves it."""

    def __init__(self, what: str, address: str, port: int, setting: str) -> None:
        super().__init__(
            f"{what} port {port} on {address} is already in use: stop what listens there, "
            f"or choose another port with {setting}"
        )
        self.port = port
        self.setting = setting


class _LogError(LaunchError):
    """An error that carries the last lines a process wrote, since those name the cause."""

    def __init__(self, message: str, log_tail: Sequence[str]) -> None:
        self.log_tail = tuple(log_tail)
        shown = "".join(f"\n  | {line}" for line in self.log_tail)
        super().__init__(f"{message}; its last lines:{shown}" if shown else message)


class ProcessDiedError(_LogError):
    """A process ended on its own."""


class StartTimeoutError(_LogError):
    """A process was not ready within the time it was given."""
