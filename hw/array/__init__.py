# SPDX-License-Identifier: Apache-2.0
"""What multiplies: the PE, the exponent remap and the rounder, the array and its engine."""
