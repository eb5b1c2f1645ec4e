"""The command line: one thin module for each command group."""

from __future__ import annotations

from sfumato.cli.app import main

__all__ = ["main"]
