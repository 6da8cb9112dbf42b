"""The libraries of AddressSanitizer and UBSan, and what their reports have in them."""

import subprocess
from pathlib import Path

REPORTS = "AddressSanitizer", "runtime error:"


def runtime(name):
    """A sanitizer's library, or None where g++ has none."""
    command = ["g++", f"-print-file-name={name}"]
    path = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    return path if path.is_file() else None


LIBRARIES = [runtime("libasan.so"), runtime("libubsan.so")]
