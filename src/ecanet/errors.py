"""What a user can do wrong, one class each; the command line prints these as one line and exits with 2.

EcanetError (a ValueError)
├── ConfigError        a setting, option or name that does not exist or does not fit
├── DataError          a data set, folder, image or annotation that is missing or broken
├── CheckpointError    a weights file that is missing, broken, unsafe or for another network
└── AttachError        nowhere to attach, or a promise that cannot be kept
"""


class EcanetError(ValueError):
    """Base of every error that ecanet raises on purpose."""


class ConfigError(EcanetError):
    """A setting, option or name that does not exist or does not fit."""


class DataError(EcanetError):
    """A data set, folder, image or annotation that is missing or broken."""


class CheckpointError(EcanetError):
    """A weights file that is missing, broken, unsafe or made for another network."""


class AttachError(EcanetError):
    """Nowhere to attach, or a promise that cannot be kept at a site."""
