"""One decode step against PyTorch's attention over padded caches with the pattern as a mask.

The paper's sizes: 256 text tokens, 32 x 32 image tokens, in the middle of the picture; 8 heads of 64, 4 layers in turn
so that their caches are not found in the processor's. Both sides write the new key and value. Times are of one layer;
the ratio is the median over interleaved pairs.

    python benchmarks/bench_decode_attention.py [--dtype bfloat16] [--candidates 64 16 1] [--pairs 15]
"""

import argparse
import statistics
import time

import torch

import dalle_kernels as dk

TEXT, GRID, HEADS, DIM, LAYERS = 256, (32, 32), 8, 64, 4
STEP = GRID[0] * GRID[1] // 2 + GRID[1] // 2
PATTERNS = {
    "row": dk.AttentionPattern.row(TEXT, GRID),
    "column": dk.AttentionPattern.column(TEXT, GRID),
    "conv": dk.AttentionPattern.conv(TEXT, GRID, kernel=11),
}


def ours(pattern, new, candidates, dtype):
    sizes = dict(prompts=1, candidates=candidates, heads=HEADS, head_dim=DIM, dtype=dtype, start=STEP)
    cache = dk.DecodeCache([pattern] * LAYERS, **sizes)
    for layer in range(LAYERS):
        cache.write_prefix(layer, *torch.randn(2, 1, HEADS, TEXT + STEP, DIM).to(dtype))

    def step():
        for layer in range(LAYERS):
            dk.decode_attention(*new, cache, layer)

    return step


def padded(pattern, new, candidates, dtype):
    token = TEXT + STEP
    shape = LAYERS, candidates, HEADS, pattern.seq_len, DIM
    keys, values = (torch.randn(shape[2:]).to(dtype).expand(shape).contiguous() for _ in range(2))
    mask = pattern.rows(token, token + 1)
    q, k, v = (x[:, :, None] for x in new)

    def step():
        for key, value in zip(keys, values):
            key[:, :, token : token + 1] = k
            value[:, :, token : token + 1] = v
            torch.nn.functional.scaled_dot_product_attention(q, key, value, attn_mask=mask)

    return step


def seconds(step, times):
    begin = time.perf_counter()
    for _ in range(times):
        step()
    return (time.perf_counter() - begin) / times / LAYERS


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--candidates", type=int, nargs="+", default=[64, 16, 1])
    parser.add_argument("--pairs", type=int, default=15)
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.dtype}, {args.pairs} pairs")
    print(f"{'pattern':8} {'candidates':>10} {'ours ms':>9} {'padded ms':>10} {'ratio':>6}   quartiles")
    for candidates in args.candidates:
        for name, pattern in PATTERNS.items():
            new = torch.randn(3, candidates, HEADS, DIM).to(dtype).unbind(0)
            steps = [make(pattern, new, candidates, dtype) for make in (ours, padded)]
            times = [max(1, round(0.02 / LAYERS / seconds(step, 3))) for step in steps]
            pairs = [[seconds(*x) for x in zip(steps, times)] for _ in range(args.pairs)]
            low, ratio, high = statistics.quantiles([b / a for a, b in pairs], n=4)
            a, b = (statistics.median(column) * 1e3 for column in zip(*pairs))
            print(f"{name:8} {candidates:10} {a:9.3f} {b:10.3f} {ratio:6.1f}   {low:.1f} - {high:.1f}", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
