"""`python -m plug`: the command line where no `plug` script is on the path (torchrun)."""

import sys

from plug.cli import main

sys.exit(main())
