"""Secrets: a type that does not show its value, and a filter for text that might.

Secrets come from the environment or from files, never from a run's configuration, which is written to the
run directory, sent to trackers and shown by ``quartet config``. A secret that got there all the same is
refused; one that gets into a log or an error message is replaced by its name.
"""

import logging
import os
import re
from collections.abc import Mapping
from typing import NoReturn

SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_KEY|ACCESS_KEY|PRIVATE_KEY)", re.I)
SHORTEST = 6  # characters; shorter values occur in any text by chance
PASSWORD_IN_URL = re.compile(r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)")


class Secret:
    """A value that is used by name: ``reveal()`` where it is needed, and nowhere else."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return "Secret(***)"

    __str__ = __repr__

    def __bool__(self) -> bool:
        return bool(self._value)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is not sent anywhere; read it where it is used")


def secrets_of(environment: Mapping[str, str]) -> dict[str, str]:
    """{name: value} of the variables that hold secrets: no paths to them, no words too short to find."""
    return {
        name: value
        for name, value in environment.items()
        if SECRET_NAME.search(name)
        and not name.endswith(("_PATH", "_FILE", "_DIR"))
        and len(value) >= SHORTEST
        and not value.isalpha()  # TOKENIZERS_PARALLELISM=false, RAY_AUTH_MODE=token
    }


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """For processes that run somebody else's code."""
    return {name: value for name, value in environment.items() if not SECRET_NAME.search(name)}


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The text with each secret of the environment, and each password in a URL, replaced."""
    found = secrets_of(os.environ if environment is None else environment)
    for name, value in sorted(found.items(), key=lambda item: -len(item[1])):
        text = text.replace(value, f"[{name}]")
    return PASSWORD_IN_URL.sub("[password]", text)


def refuse_secrets(text: str, environment: Mapping[str, str] | None = None) -> None:
    """ValueError when the text of a configuration holds a secret; the message does not."""
    for line in text.splitlines():
        if (clean := redact(line, environment)) != line:
            raise ValueError(
                f"the run holds a secret: {clean.strip()}; configurations are written to run_dir and to "
                "trackers. Take it out, and give it in an environment variable or a file"
            )


class Redaction(logging.Filter):
    """Goes on handlers: what passes holds no secret, tracebacks included."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if (clean := redact(text)) != text:
            record.msg, record.args = clean, ()
        if record.exc_info and not record.exc_text:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
        if record.exc_text:
            record.exc_text = redact(record.exc_text)
        return True


def redact_logs() -> None:
    """All that is logged in this process, from here on."""
    root = logging.getLogger()
    if not root.handlers:
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for handler in [*root.handlers, *logging.getLogger("quartet").handlers]:
        if not any(isinstance(known, Redaction) for known in handler.filters):
            handler.addFilter(Redaction())
