"""Builds, checks and benchmarks everything on a GPU; see docs/gpu.md."""

import sys

from gpu.main import main

sys.exit(main())
