"""`python -m eet_patch`."""

import sys

from eet_patch.cli import main

sys.exit(main())
