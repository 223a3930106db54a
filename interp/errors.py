"""The errors that interp raises on purpose.

A message says what was given, what was expected and what to do. Every class derives from `InterpError`, so that one
`except` catches them all; some also derive from the built-in that fits, so that ordinary code keeps working.
"""


class InterpError(Exception):
    """Any error that interp raises on purpose."""


class InputError(InterpError, ValueError):
    """An argument, prompt, concept or text that cannot be used as given."""


class ModelError(InterpError):
    """A model or checkpoint that cannot be loaded, understood or trusted."""


class ResourceError(InterpError):
    """A pinned package, file or folder that cannot be fetched, verified or written."""


class ResultError(InterpError):
    """A result file that is not ours, is from a newer version, is damaged, or does not match."""


class MemoryBudgetError(InterpError, MemoryError):
    """A run that needs more memory than there is; the message has both figures."""
