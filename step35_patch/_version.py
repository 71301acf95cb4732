"""The package's version: read by setup.cfg, and by whatever puts it into a message or a file."""

__version__ = "0.1.0"
