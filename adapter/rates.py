"""Rates as settings have them: `60/minute`, or several, `5 per 10 seconds; 60/hour`."""

import re
from dataclasses import dataclass
from typing import Self

UNITS = {
    "second": 1,
    "minute": 60,
    "hour": 3600,
    "day": 86_400,
    "month": 30 * 86_400,
    "year": 365 * 86_400,
}
RATE = re.compile(rf"(\d+)\s*(?:/|per)\s*(\d*)\s*({'|'.join(UNITS)})s?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Rate:
    """At most `calls` in each window of `count` units."""

    calls: int
    count: int
    unit: str

    @classmethod
    def parse_all(cls, text: str) -> list[Self]:
        """The rates of a setting, between which stands `,`, `;` or `|`. Raises ValueError."""
        rates = []
        for part in re.split(r"[,;|]", text):
            match = RATE.fullmatch(part.strip())
            if match is None:
                msg = f"{part!r} is not a rate"
                raise ValueError(msg)
            rates.append(cls(int(match[1]), int(match[2] or 1), match[3].lower()))
        return rates

    @property
    def seconds(self) -> int:
        """The window's length."""
        return self.count * UNITS[self.unit]

    def __str__(self) -> str:
        return f"{self.calls} per {self.count} {self.unit}"
