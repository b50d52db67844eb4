# SPDX-License-Identifier: Apache-2.0
"""The golden model: number format, exact arithmetic, checkpoints, decoding and its evaluation."""
