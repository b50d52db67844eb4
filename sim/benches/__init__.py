# SPDX-License-Identifier: Apache-2.0
"""cocotb testbenches of units, and what they share."""
