"""`python -m dalle` is `dalle`."""

import sys

from dalle.cli import main

sys.exit(main())
