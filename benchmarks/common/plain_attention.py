"""A pattern in plain PyTorch: dense attention over the keys that a block of queries needs."""

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa


def plain_attention(pattern, rows: int):
    """attention(q, k, v) in blocks of `rows` image rows, or image columns if that is the pattern's layout.

    Text attends to text causally. The keys of a block are gathered: all text, and the image tokens that any of its
    queries attends to. A mask excludes the keys that a single query does not attend to.
    """
    text, (height, width) = pattern.text_len, pattern.grid
    columns = pattern.layout == "columns"
    places = torch.arange(height * width).view(height, width)
    order = (places.t() if columns else places).flatten()
    seen = pattern.dense()[text:, text:][order].unflatten(0, (-1, rows * (height if columns else width)))
    keys = [block.any(0).nonzero().flatten() for block in seen]
    most = max(map(len, keys))
    # Padding repeats a key of the block, and is masked.
    index = torch.stack([torch.cat([block, block[:1].expand(most - len(block))]) for block in keys])
    mask = seen.gather(2, index[:, None].expand(-1, seen.shape[1], -1))
    for i, block in enumerate(keys):
        mask[i, :, len(block) :] = False
    mask = torch.cat([mask.new_ones(*mask.shape[:2], text), mask], 2)
    index = torch.cat([torch.arange(text).expand(len(index), -1), text + index], 1)
    queries, back = text + order, order.argsort()

    def attention(q, k, v):
        heads = q.shape[:2]
        q_blocks = q.index_select(2, queries).flatten(0, 1).unflatten(1, (len(index), -1))
        gathered = [x.index_select(2, index.flatten()).flatten(0, 1).unflatten(1, index.shape) for x in (k, v)]
        image = sdpa(q_blocks, *gathered, attn_mask=mask).flatten(1, 2).unflatten(0, heads)
        before = sdpa(*(x[:, :, :text] for x in (q, k, v)), is_causal=True)
        return torch.cat([before, image.index_select(2, back)], 2)

    return attention
