"""The tiny run as a config file."""

from tests.tiny import tiny_config as get_config  # noqa: F401
