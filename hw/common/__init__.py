# SPDX-License-Identifier: Apache-2.0
"""What units of all folders use."""
