# SPDX-License-Identifier: Apache-2.0
"""`python -m speq`: the same as the command `speq`."""

from speq.cli import main

if __name__ == "__main__":
    main()
