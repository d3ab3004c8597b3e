"""Every error raised on purpose derives from `DyvteError`; messages name the argument, what was given and accepted."""


class DyvteError(Exception):
    """Base class."""


class InvalidArgumentError(DyvteError, ValueError):
    """An argument has a value or a shape that is not accepted."""


class ImageError(DyvteError, ValueError):
    """An image is missing, unreadable, truncated or too large."""


class PromptError(DyvteError, ValueError):
    """A prompt does not fit: image marks and pictures disagree, or it is longer than `max_len`."""


class ModelError(DyvteError):
    """A checkpoint is missing, damaged (NaN weights), or of a family the engine does not run."""


class HeadsError(DyvteError):
    """Exit heads are missing, damaged, or made for another model shape."""


class CalibrationError(HeadsError):
    """A target that the calibration samples cannot guarantee, or heads without a calibration."""


class DataError(DyvteError, ValueError):
    """A training sample or a folder of labels is damaged, incomplete or not what was asked; names the line."""


class SourceError(DyvteError):
    """Pictures, names or pretrained parts that are fetched at run time cannot be: a package, a program, the network."""


class FileError(DyvteError, OSError):
    """A file or folder cannot be written: a full disk, a read-only folder, a path through a file."""


class DeviceError(DyvteError):
    """A device, dtype or attention backend that this machine or this build does not have."""


class CacheError(DyvteError):
    """The K/V page pool cannot hold what was asked."""


class RequestCancelledError(DyvteError):
    """A request was cancelled before its answer was complete."""


class NativeLibraryError(DyvteError, ImportError):
    """The native library is missing or does not load."""


def first_line(error: BaseException) -> str:
    """What a library's error says, at most 300 characters of it; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
