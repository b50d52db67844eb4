# SPDX-License-Identifier: Apache-2.0
"""Sampling: the noise that logits are ranked with."""
