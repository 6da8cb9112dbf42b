"""Stage tune, which runs only if named: lines for the launch table of the Triton kernels, in bfloat16 at head dim 64;
in a long run for the whole table.
"""

import subprocess
import sys
from functools import partial

from common.setting import ROOT, python

OPERATIONS = ("sample_tokens", "decode_attention", "gumbel_softmax.last", "gumbel_softmax", "sparse_attention")
SHORT = ("--dtypes", "bfloat16", "--head-dims", "64")


def items(setting):
    return [(operation, partial(lines, operation, () if setting.long else SHORT)) for operation in OPERATIONS]


def lines(operation, options):
    command = python("-m", "dalle_kernels.tune", operation, *options)
    found = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    print(found, file=sys.stderr)
    return [{"launch table": found.splitlines()}]
