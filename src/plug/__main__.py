"""`python -m plug`: the same as the command `plug`."""

import sys

from plug.cli import main

if __name__ == "__main__":
    sys.exit(main())
