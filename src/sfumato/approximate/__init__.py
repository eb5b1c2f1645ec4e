"""Ways to save time that change the picture: all off unless asked for, each in one place."""

from sfumato.approximate.features import Blocks, Levels, able, reuse

__all__ = ["Blocks", "Levels", "able", "reuse"]
