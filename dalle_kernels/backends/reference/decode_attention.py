"""One decode step in plain PyTorch: softmax(q k^T * scale) v over the text and image keys that the schedule lists."""

import torch

from ... import autocast
from ...decode_schedule import STEP_WORDS, ScheduleHeader


def decode_attention(q, k, v, prefix_k, prefix_v, image_k, image_v, schedule, step, scale):
    """[P * C, H, D]; statistics in float32 (float64 for float64 inputs). Reads the step on the host."""
    steps_at, runs_at = int(schedule[ScheduleHeader.STEPS_AT]), int(schedule[ScheduleHeader.RUNS_AT])
    slot, *lists = schedule[steps_at:runs_at].view(-1, STEP_WORDS)[int(step)].tolist()
    runs = schedule[runs_at:].view(-1, 2)
    image, text = (_expand(runs[first : first + count]) for first, count in (lists[:2], lists[2:]))
    image_k[:, :, slot] = k
    image_v[:, :, slot] = v

    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    candidates = len(q) // len(prefix_k)

    def gather(prefix, slots):
        shared = prefix.index_select(2, text).repeat_interleave(candidates, 0)
        return torch.cat([shared, slots.index_select(2, image)], 2).to(wide)

    with autocast.disabled(q):
        scores = q.to(wide)[:, :, None] @ gather(prefix_k, image_k).transpose(-1, -2) * scale
        out = scores.softmax(-1) @ gather(prefix_v, image_v)
    return out[:, :, 0].to(q.dtype)


def _expand(runs):
    """The positions in `runs` (int32 [n, 2]: begin, length)."""
    nothing = torch.arange(0, device=runs.device)
    return torch.cat([nothing, *(nothing.new_tensor(range(a, a + length)) for a, length in runs.tolist())])
