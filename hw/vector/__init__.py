# SPDX-License-Identifier: Apache-2.0
"""The vector unit: all that a pass computes outside the array."""
