"""Builds, checks and measures everything on a GPU: docs/gpu.md."""

import sys

from gpu.main import main

sys.exit(main())
