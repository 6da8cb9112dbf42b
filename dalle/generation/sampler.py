"""Drawing the codes of pictures with a prior: the decode loop, its replay as a CUDA graph, and the memory it takes."""

from collections.abc import Callable

import torch
from torch import Tensor

import dalle_kernels as dk
from dalle.errors import UserError
from dalle.models.prior import Prior
from dalle_kernels.decode_schedule import compile_schedule

LOGIT_COPIES = 6  # float32 copies of a step's logits that sampling may hold at once: sorted, with indices, cumulated
RESIDUAL_COPIES = 16  # of the residual stream, for a block's input, queries, keys, values and MLP


def generate_codes(
    prior: Prior,
    text: Tensor,
    *,
    candidates: int = 1,
    seeds: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    given: Tensor | None = None,
    redraw: Tensor | None = None,
) -> Tensor:
    """Draw the codes of `candidates` pictures for every caption.

    A caption is run once, whatever the number of its candidates; then every step feeds one code per picture through
    the decode cache. Of a given picture the codes before the first one to redraw are run with the caption, and later
    ones are fed in their turn in place of a draw, so all that follows is conditioned on them.

    Args:
        prior: the model.
        text: captions, int64 [P, text_len], from `Prior.pack_text`.
        candidates: pictures per caption, C.
        seeds: int64 [P * C], one per picture, in the order p * C + c; None draws them. A picture depends on its seed
            and caption, not on the others in the batch.
        temperature, top_k, top_p: see `dalle_kernels.sample_tokens`.
        given: the codes of a picture for each caption, int64 [P, rows, columns] or [P, rows * columns].
        redraw: which codes of the given pictures to draw anew, bool [rows, columns], the last one among them: what
            comes after all that is drawn conditions nothing.

    Returns:
        Codes, int64 [P * C, rows, columns].

    Raises:
        UserError: counts, shapes or dtypes are wrong, or `redraw` does not reach the end of the picture.
    """
    if candidates < 1:
        raise UserError(f"candidates must be at least 1, not {candidates}")
    count = len(text) * candidates
    if seeds is None:
        seeds = torch.randint(2**62, (count,), device=text.device)
    if seeds.shape != (count,):
        raise UserError(f"there must be {count} seeds, one per picture, not {list(seeds.shape)}")
    given, drawn = _check_given(prior, given, redraw, text)
    start = drawn.index(True)

    codes = given.repeat_interleave(candidates, 0)
    drawn = torch.tensor(drawn, device=codes.device)
    with torch.inference_mode():
        cache = _decode_cache(prior, len(text), candidates, start)
        place = cache.step.view(1)  # the same memory: it moves on with the cache
        offset = cache.step.expand(count)

        def draw(hidden: Tensor) -> None:
            logits = prior.image_logits(hidden)
            new = dk.sample_tokens(
                logits, temperature=temperature, top_k=top_k, top_p=top_p, seed=seeds, offset=offset
            )
            kept = codes.index_select(1, place)
            codes.index_copy_(1, place, torch.where(drawn.index_select(0, place), new[:, None], kept))

        def step() -> None:
            draw(prior.step(codes.index_select(1, place), place, cache))

        draw(prior.prefill(text, given[:, :start], cache).repeat_interleave(candidates, 0))
        steps = prior.config.image_len - 1 - start
        if cache.capturable and steps > 1:
            _replay(step, steps, cache.device)
        else:
            for _ in range(steps):
                step()
    return codes.unflatten(1, prior.config.grid)


def sequence_bytes(prior: Prior, candidates: int) -> int:
    """About how much memory each of `candidates` pictures of a caption takes in `generate_codes`, in bytes.

    Its keys and values in the decode cache and its logits; of the caption, which they share, the keys and values and
    what running it takes.
    """
    config, weight = prior.config, prior.text_embedding.weight.element_size()
    key_and_value = 2 * config.width * weight
    slots = sum(compile_schedule(pattern).slots for pattern in config.schedule())
    picture = slots * key_and_value + LOGIT_COPIES * 4 * config.image_vocab
    caption = config.text_len * (config.layers * key_and_value + RESIDUAL_COPIES * config.width * weight)
    return picture + caption // candidates


def _check_given(
    prior: Prior, given: Tensor | None, redraw: Tensor | None, text: Tensor
) -> tuple[Tensor, list[bool]]:
    """Codes [P, rows * columns], and for each whether it is drawn."""
    config, shape = prior.config, (len(text), *prior.config.grid)
    if given is None and redraw is None:
        return text.new_zeros(len(text), config.image_len), [True] * config.image_len
    if given is None or redraw is None:
        raise UserError("given codes and what of them to redraw go together: give both or neither")
    if given.dtype != torch.int64 or given.shape not in (shape, (len(text), config.image_len)):
        raise UserError(f"given codes must be int64 {list(shape)}, not {_kind(given)}")
    if redraw.dtype != torch.bool or redraw.shape != config.grid:
        raise UserError(f"what to redraw must be bool {list(config.grid)}, not {_kind(redraw)}")
    given, drawn = given.flatten(1).to(text.device), redraw.flatten().cpu()
    if not drawn.any():
        raise UserError("what to redraw is empty, so there is nothing to draw: mark the codes to draw anew")
    if not drawn[-1]:
        raise UserError(
            "what to redraw must reach the end of the picture, its bottom right corner: "
            "codes are drawn in reading order and cannot heed what comes after them"
        )
    kept = given[:, ~drawn]
    if kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < config.image_vocab:
        raise UserError(f"given codes must be in [0, {config.image_vocab}), not {int(kept.min())} to {int(kept.max())}")
    return given, drawn.tolist()


def _decode_cache(prior: Prior, prompts: int, candidates: int, start: int) -> dk.DecodeCache:
    config, weights = prior.config, prior.text_embedding.weight
    device = weights.device
    autocast = torch.is_autocast_enabled(device.type)
    return dk.DecodeCache(
        config.schedule(),
        prompts=prompts,
        candidates=candidates,
        heads=config.heads,
        head_dim=config.head_dim,
        dtype=torch.get_autocast_dtype(device.type) if autocast else weights.dtype,
        device=device,
        start=start,
    )


def _replay(step: Callable[[], None], times: int, device: torch.device) -> None:
    """Runs `step`, which keeps all that changes on the device, `times` times: once as it is, then as a CUDA graph.

    The first run prepares what a capture must not: kernels are loaded, and autocast keeps its copies of the weights
    in ordinary memory, from where the graph reads them.
    """
    caller, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(caller)
    with torch.cuda.stream(stream):
        step()
        graph = torch.cuda.CUDAGraph()
        # thread_local: what other threads do with the device meanwhile, such as loading data, is no error
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step()  # recorded, not run
        for _ in range(times - 1):
            graph.replay()
    caller.wait_stream(stream)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
