"""Sampling of image codes from a prior: the decode loop, its replay as a CUDA graph, and its memory use."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

import dalle_kernels as dk
from dalle.errors import UserError
from dalle.models.prior import Prior
from dalle.models.sharded import with_whole_weights
from dalle_kernels.decode_schedule import compile_schedule

LOGIT_COPIES = 6  # float32 copies of a step's logits that sampling may hold at once: sorted, indices, cumulative sums
RESIDUAL_COPIES = 16  # copies of the residual stream: a block's input, queries, keys, values and MLP


def generate_codes(
    prior: Prior,
    text: Tensor,
    *,
    candidates: int = 1,
    seeds: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    guidance: float = 1.0,
    negative: Tensor | None = None,
    given: Tensor | None = None,
    resample: Tensor | None = None,
) -> Tensor:
    """Samples the codes of `candidates` images for every prompt.

    The prefill runs a prompt once for all its candidates; then every step feeds one code per image through the decode
    cache. For given images, the prefill includes the codes before the first one to resample. Later codes that are kept
    replace the sampled ones, so the codes after them are conditioned on them.

    Args:
        prior: the model. If its weights are sharded (FSDP2), all ranks must call this function, which gathers them.
        text: prompts, int64 [P, text_len], from `Prior.pack_text`.
        candidates: images per prompt, C.
        seeds: int64 [P * C], one per image, in the order p * C + c; None takes random ones. An image depends on its
            seed and prompt only, not on the rest of the batch.
        temperature, top_k, top_p: see `dalle_kernels.sample_tokens`.
        min_p: exclude codes less probable than this fraction of the most probable one's probability; None: none.
        guidance: the scale s of classifier-free guidance: logits are u + s (c - u), where c are those of the prompt and
            u those of `negative`. 1: those of the prompt alone, at half the cost.
        negative: texts to steer away from, as `text`; None: empty ones.
        given: the codes of an image for each prompt, int64 [P, rows, columns] or [P, rows * columns].
        resample: which of the given codes to resample, bool [rows, columns]. The last code must be among them, because
            codes after the last resampled one condition nothing.

    Returns:
        Codes, int64 [P * C, rows, columns].

    Raises:
        UserError: counts, shapes or dtypes are wrong, or `resample` does not include the last code.
    """
    if candidates < 1:
        raise UserError(f"candidates must be at least 1, not {candidates}")
    count = len(text) * candidates
    if seeds is None:
        seeds = torch.randint(2**62, (count,), device=text.device)
    if seeds.shape != (count,):
        raise UserError(f"there must be {count} seeds, one per image, not {list(seeds.shape)}")
    given, sampled = _check_given(prior, given, resample, text)
    start = sampled.index(True)

    codes = given.repeat_interleave(candidates, 0)
    sampled = torch.tensor(sampled, device=codes.device)
    prior = with_whole_weights(prior)
    texts = [text] if guidance == 1 else [text, prior.pack_text([[]] * len(text)) if negative is None else negative]
    with torch.inference_mode():
        cache = _decode_cache(prior, len(texts) * len(text), candidates, start)
        position = cache.step.view(1)  # a view, so it advances with the cache
        offset = cache.step.expand(count)

        def sample(hidden: Tensor) -> None:
            logits = _guided(prior.image_logits(hidden), guidance)
            if min_p is not None:
                likely = logits.amax(-1, keepdim=True) + temperature * math.log(min_p)
                logits = logits.masked_fill(logits < likely, -torch.inf)
            new = dk.sample_tokens(
                logits, temperature=temperature, top_k=top_k, top_p=top_p, seed=seeds, offset=offset
            )
            kept = codes.index_select(1, position)
            codes.index_copy_(1, position, torch.where(sampled.index_select(0, position), new[:, None], kept))

        def step() -> None:
            last = codes.index_select(1, position)
            sample(prior.step(last.repeat(len(texts), 1), position, cache))

        prefix = given[:, :start].repeat(len(texts), 1)
        sample(prior.prefill(torch.cat(texts), prefix, cache).repeat_interleave(candidates, 0))
        steps = prior.config.image_len - 1 - start
        if cache.capturable and steps > 1:
            _replay(step, steps, cache.device)
        else:
            for _ in range(steps):
                step()
    return codes.unflatten(1, prior.config.grid)


def sequence_bytes(prior: Prior, candidates: int) -> int:
    """Estimates the memory that `generate_codes` needs per image, with `candidates` images per prompt, in bytes.

    Counts the image's keys and values in the decode cache and its logits, and its share of the prompt's keys, values
    and activations.
    """
    config, weight = prior.config, prior.text_embedding.weight.element_size()
    key_and_value = 2 * config.width * weight
    slots = sum(compile_schedule(pattern).slots for pattern in config.schedule())
    image = slots * key_and_value + LOGIT_COPIES * 4 * config.image_vocab
    prompt = config.text_len * (config.layers * key_and_value + RESIDUAL_COPIES * config.width * weight)
    return image + prompt // candidates


def _guided(logits: Tensor, guidance: float) -> Tensor:
    """The logits to sample from; with guidance, of those of the prompts and then those of the texts to avoid."""
    if guidance == 1:
        return logits
    wanted, avoided = logits.chunk(2)
    return avoided + guidance * (wanted - avoided)


def _check_given(
    prior: Prior, given: Tensor | None, resample: Tensor | None, text: Tensor
) -> tuple[Tensor, list[bool]]:
    """Codes [P, rows * columns], and for each position whether it is sampled."""
    config, shape = prior.config, (len(text), *prior.config.grid)
    if given is None and resample is None:
        return text.new_zeros(len(text), config.image_len), [True] * config.image_len
    if given is None or resample is None:
        raise UserError("given codes and the mask of codes to resample go together: give both or neither")
    if given.dtype != torch.int64 or given.shape not in (shape, (len(text), config.image_len)):
        raise UserError(f"given codes must be int64 {list(shape)}, not {_kind(given)}")
    if resample.dtype != torch.bool or resample.shape != config.grid:
        raise UserError(f"the mask of codes to resample must be bool {list(config.grid)}, not {_kind(resample)}")
    given, sampled = given.flatten(1).to(text.device), resample.flatten().cpu()
    if not sampled.any():
        raise UserError("the mask is empty, so there is nothing to generate: set it for the codes to resample")
    if not sampled[-1]:
        raise UserError(
            "the mask must reach the bottom right corner of the image: "
            "codes are generated in raster order and cannot condition on later ones"
        )
    kept = given[:, ~sampled]
    if kept.numel() and not 0 <= int(kept.min()) <= int(kept.max()) < config.image_vocab:
        raise UserError(f"given codes must be in [0, {config.image_vocab}), not {int(kept.min())} to {int(kept.max())}")
    return given, sampled.tolist()


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
    """Runs `step`, all of whose state is on the device, `times` times: once eagerly, then as a CUDA graph.

    The eager run does what a capture must not: it loads kernels, and autocast caches its copies of the weights in
    memory outside the graph's pool.
    """
    caller, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    stream.wait_stream(caller)
    with torch.cuda.stream(stream):
        step()
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads may use the device during the capture, for example to load data
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step()  # captured, not run
        for _ in range(times - 1):
            graph.replay()
    caller.wait_stream(stream)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
