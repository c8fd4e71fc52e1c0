"""Controls that several experiments share."""

from workbench.probing import random_copy

__all__ = ["random_copy"]
