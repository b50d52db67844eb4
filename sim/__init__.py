# SPDX-License-Identifier: Apache-2.0
"""cocotb testbenches in which the golden model checks the RTL bit for bit."""
