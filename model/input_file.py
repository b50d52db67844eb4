# SPDX-License-Identifier: Apache-2.0
"""Files that others have made: only regular ones are read, and of small ones no more than expected.

Opening a named pipe may wait for ever, and a device such as /dev/zero has no end.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from pathlib import Path

#: Regular expression of how an encoded model begins (`speq.model.encoded_file`).
ENCODED_MODEL = rb'(?s).{8}\{"__metadata__":\{"speq":'
#: Regular expression of how an image of the accelerator's memory begins (`speq.host.image`).
IMAGE = rb"SPEQIMG\0"
_log = logging.getLogger(__name__)


def check_regular(path: Path) -> None:
    """Raises OSError, naming the path, unless it is a regular file or a link to one."""
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    _log.debug("reading %s, %d bytes", path, found.st_size)


def read_limited(path: Path, limit: int) -> bytes:
    """The content of a file of at most `limit` bytes.

    Raises OSError, naming the path, if it is longer, no regular file or cannot be read.
    """
    check_regular(path)
    with path.open("rb") as file:
        content = file.read(limit + 1)  # whatever size the file system states
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit} bytes", str(path))
    return content
