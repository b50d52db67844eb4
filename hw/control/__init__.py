# SPDX-License-Identifier: Apache-2.0
"""What decides: registers, run control, the program walker and the speculation loop."""
