"""The README's example of dropping the operations into a training loop runs as printed, and trains."""

import re
from pathlib import Path

import torch


def test_the_drop_in_example_trains(seed):
    (code,) = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "README.md").read_text(), re.DOTALL)
    losses = []
    code = code.replace("optimizer.zero_grad()", "losses.append(loss.item()), optimizer.zero_grad()")
    exec(compile(code, "README.md", "exec"), {"losses": losses})
    assert len(losses) == 20
    assert losses[-1] < losses[0]
    assert torch.isfinite(torch.tensor(losses)).all()
