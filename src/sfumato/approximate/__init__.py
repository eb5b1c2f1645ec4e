"""Ways to save time that change the picture: all off unless asked for, each in one place."""

from sfumato.approximate.features import Blocks, Levels, able, reuse
from sfumato.approximate.int8 import Rounded, rounded, why_not

__all__ = ["Blocks", "Levels", "Rounded", "able", "reuse", "rounded", "why_not"]
