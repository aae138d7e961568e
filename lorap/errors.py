"""Every mistake a user can make ends in one of these: a sentence that names the thing, the numbers and the way out."""


class LoRAPError(Exception):
    """Base of all errors that lorap raises on purpose. The command line prints it and exits with code 2."""


def shown(text: object, length: int = 200) -> str:
    """What a file or a library says, for a message: one line of at most ``length`` characters that a terminal takes as text."""
    line = " ".join(str(text).split())
    return "".join(sign if sign.isprintable() else "?" for sign in line[:length])


class ConfigError(LoRAPError, ValueError):
    """An option is out of range, or options contradict each other."""


class ArchitectureError(LoRAPError):
    """The model is of a family, or in a shape, that lorap does not know how to compress."""


class CalibrationError(LoRAPError):
    """A text or token source cannot be used, or the activations it causes are not finite."""


class FactorizationError(LoRAPError):
    """A weight cannot be factorized: wrong shapes, an impossible rank, NaN or infinity."""


class CheckpointError(LoRAPError):
    """A model folder cannot be read or written."""


class TaskError(LoRAPError):
    """The questions of a zero-shot task cannot be had, or a model cannot be scored on them."""


class ShapeError(LoRAPError, ValueError):
    """The tensors given to an op do not fit together."""


class BackendError(LoRAPError):
    """The kernels that were asked for cannot run here."""


class ProcessError(LoRAPError):
    """A process of a run with many of them cannot be reached, or has died."""


class JournalError(LoRAPError):
    """An unfinished run does not fit this command, or another process is at work on the same output."""
