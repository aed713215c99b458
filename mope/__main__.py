"""`python -m mope`: the command `mope`, where its script is not on the PATH."""

import sys

from mope.cli import main

sys.exit(main())
