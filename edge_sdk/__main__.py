"""`python -m edge_sdk` is the command `symbiont`."""

import sys

from edge_sdk.cli import main

sys.exit(main())
