"""Check the adapter's environment before anything starts: `python -m adapter.check`.

Writes a line to stderr for each problem; the exit status is 1 if the adapter would not start.
"""

import os
import sys

from adapter.auth.keys import Keyring
from adapter.engine.channel import TritonCredentials
from adapter.errors import SettingsError
from adapter.setting_names import misspelt
from adapter.settings import OPEN_TO_ALL, load_settings


def main() -> int:
    """Report the problems of this process's environment."""
    for warning in misspelt(os.environ):
        sys.stderr.write(f"warning: {warning}\n")
    try:
        settings = load_settings()
        keyring = Keyring(settings.api_keys, settings.api_keys_file)
        TritonCredentials.of(settings).check()
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    if settings.is_public and not keyring.required:
        sys.stderr.write(f"warning: {OPEN_TO_ALL.format(host=settings.host)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
