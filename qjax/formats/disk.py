"""Waits for the disk."""

import os
from pathlib import Path


def flush_to_disk(path: Path) -> None:
    """Waits until a file's (or folder's entries') bytes are on the disk, so that a rename never outruns them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
