"""The errors that a user can act on. Each message names the place and the remedy.

ServegridError
 ├── ConfigError         the configuration of a study is not valid
 ├── ModelError          a model is missing or damaged
 ├── EngineError         an engine did not start, or died
 │    └── NotServableError  the deployment cannot start here, whatever is tried: a result
 ├── LoadError           the load client could not send requests
 ├── RecordError         a record cannot be written or read, or belongs to another study
 ├── BundleError         a bundle cannot be made or read safely
 ├── ComparisonError     two studies cannot be compared
 └── ExchangeError       a file cannot be imported from another tool or exported for it
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ServegridError(Exception):
    """Base class of all errors that a user can act on."""


class ConfigError(ServegridError):
    """The configuration is not valid. Nothing has been started."""


class ModelError(ServegridError):
    """A model is missing or damaged."""


class EngineError(ServegridError):
    """An engine did not start within its time limit, or died."""


class NotServableError(EngineError):
    """A deployment cannot start, and no repeat changes that. This is a result of its cells.

    `verdict` is one of `records.verdict.VERDICTS`, `evidence` has the numbers behind it.
    """

    def __init__(
        self, message: str, verdict: str, evidence: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.verdict = verdict
        self.evidence: Mapping[str, Any] = evidence or {}


class LoadError(ServegridError):
    """No request could be sent: the endpoint is unreachable, or the prompts cannot be made."""


class RecordError(ServegridError):
    """A record cannot be written or read, or does not belong to the study."""


class BundleError(ServegridError):
    """These results cannot be packed, or this file is not a bundle that can be read safely."""


class ComparisonError(ServegridError):
    """Two studies cannot be compared."""


class ExchangeError(ServegridError):
    """A file of another tool cannot be imported, or there is nothing to export."""
