# SPDX-License-Identifier: Apache-2.0
"""The way to and from memory: AXI4 ports, and the readers and writers of each kind of data."""
