# SPDX-License-Identifier: Apache-2.0
"""What drives an accelerator, on any board: registers, memory, programs and decoding."""
