# SPDX-License-Identifier: Apache-2.0
"""Errors of this package, for those who load nothing else of it."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: missing, damaged, inconsistent or unsupported."""
