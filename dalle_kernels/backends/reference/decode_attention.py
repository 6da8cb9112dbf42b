"""One decode step in plain PyTorch: softmax(q k^T * scale) v over the text and image keys that the schedule lists."""

import torch

from ... import autocast
from ...decode_schedule import STEP_WORDS, ScheduleHeader


def decode_attention(q, k, v, prefix_k, prefix_v, image_k, image_v, schedule, step, scale, text_lengths=None):
    """[P * C, H, D]; statistics in float32 (float64 for float64 inputs). Reads the step on the host."""
    steps_at, runs_at = int(schedule[ScheduleHeader.STEPS_AT]), int(schedule[ScheduleHeader.RUNS_AT])
    slot, *lists = schedule[steps_at:runs_at].view(-1, STEP_WORDS)[int(step)].tolist()
    runs = schedule[runs_at:].view(-1, 2)
    image, text = (_expand(runs[first : first + count]) for first, count in (lists[:2], lists[2:]))
    image_k[:, :, slot] = k
    image_v[:, :, slot] = v

    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    candidates = len(q) // len(prefix_k)

    lengths = text_lengths if text_lengths is not None else text.new_full((len(prefix_k),), prefix_k.shape[2])
    absent = torch.cat([text >= lengths[:, None], image.new_zeros(len(lengths), len(image), dtype=torch.bool)], 1)
    absent = absent.repeat_interleave(candidates, 0)[:, None, :, None]

    def gather(prefix, slots):
        shared = prefix.index_select(2, text).repeat_interleave(candidates, 0)
        return torch.cat([shared, slots.index_select(2, image)], 2).masked_fill(absent, 0).to(wide)

    with autocast.disabled(q):
        scores = q.to(wide)[:, :, None] @ gather(prefix_k, image_k).transpose(-1, -2) * scale
        scores = scores.masked_fill(absent.transpose(-1, -2), float("-inf"))
        out = scores.softmax(-1) @ gather(prefix_v, image_v)
    return out[:, :, 0].to(q.dtype)


def _expand(runs):
    """The positions in `runs` (int32 [n, 2]: begin, length)."""
    nothing = torch.arange(0, device=runs.device)
    return torch.cat([nothing, *(nothing.new_tensor(range(a, a + length)) for a, length in runs.tolist())])
