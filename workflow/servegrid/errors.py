"""What can go wrong, as types. Every message names the place and the remedy.

ServegridError
 ├── ConfigError         the study's configuration cannot be measured as it stands
 ├── ModelError          a model is missing, damaged or not of the expected kind
 ├── EngineError         an engine did not come up, or died
 ├── LoadError           the load could not be put on the endpoint at all
 ├── RecordError         a record cannot be written, read or believed
 ├── BundleError         a bundle cannot be made, or is not safe to read
 ├── ComparisonError     two studies cannot be compared
 └── ExchangeError       a file of another tool cannot be read, or a trial not be written for one
"""


class ServegridError(Exception):
    """Base of all errors that a user can do something about."""


class ConfigError(ServegridError):
    """The configuration cannot be measured as it stands; nothing has been started."""


class ModelError(ServegridError):
    """A model is missing, damaged or not of the expected kind."""


class EngineError(ServegridError):
    """An engine did not come up within its limit, or died."""


class LoadError(ServegridError):
    """No request could be sent: the endpoint is unreachable or the prompts cannot be made."""


class RecordError(ServegridError):
    """A record cannot be written, cannot be read, or does not belong to the study."""


class BundleError(ServegridError):
    """A bundle cannot be made of these results, or this file is not one that can be read safely."""


class ComparisonError(ServegridError):
    """Two studies cannot be held against each other."""


class ExchangeError(ServegridError):
    """A file of another tool cannot be read, or there is nothing to be written for it."""
