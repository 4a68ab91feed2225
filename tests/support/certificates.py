"""Makes certificates for tests: authorities, and what they issue, as PEM files."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme

Chain = trustme.LeafCert


@dataclass(frozen=True, slots=True)
class PemFiles:
    """Paths of a certificate chain and its key."""

    cert: Path
    key: Path

    def write(self, chain: Chain) -> None:
        """Replace both; PostgreSQL wants a key that only its owner can read."""
        self.cert.write_bytes(b"".join(blob.bytes() for blob in chain.cert_chain_pems))
        self.key.write_bytes(chain.private_key_pem.bytes())
        self.key.chmod(0o600)


def files(folder: Path, name: str, chain: Chain) -> PemFiles:
    """Write a certificate and its key to `name.pem` and `name.key`."""
    made = PemFiles(folder / f"{name}.pem", folder / f"{name}.key")
    made.write(chain)
    return made


def write_cas(path: Path, *authorities: trustme.CA) -> Path:
    """Write the certificates of these authorities to one file."""
    path.write_bytes(b"".join(authority.cert_pem.bytes() for authority in authorities))
    return path


def expired(authority: trustme.CA, *names: str) -> Chain:
    """A certificate that was valid until yesterday."""
    return authority.issue_cert(*names, not_after=datetime.now(UTC) - timedelta(days=1))
