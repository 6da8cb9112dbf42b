"""Measures of dVAE, prior and CLIP on real images: reconstruction, likelihood, retrieval."""

import torch

from dalle.evaluation.evaluation_set import BATCH, EvaluationSet, chunks, evenly_spaced
from dalle.evaluation.statistics import proportion, ssim
from dalle.generation.pipeline import Pipeline
from dalle.metrics import codebook_usage, psnr, retrieval_rank
from dalle.models.prior import IGNORE


def reconstruction(pipeline: Pipeline, images: EvaluationSet) -> dict:
    """PSNR and SSIM of the reconstructions, and codebook usage."""
    real, decoded = images.images / 255, images.reconstructions / 255
    vocab = pipeline.dvae.config.vocab
    used, perplexity = codebook_usage(images.codes, vocab)
    similarity = torch.cat([ssim(a, b) for a, b in zip(real.split(BATCH), decoded.split(BATCH))])
    return {
        "images": len(images.indices),
        "PSNR, dB": psnr(real, decoded),
        "SSIM": similarity.mean().item(),
        "codes in use": used,
        "codes": vocab,
        "perplexity": perplexity,
    }


@torch.inference_mode()
def likelihood(pipeline: Pipeline, images: EvaluationSet) -> dict:
    """The prior's negative log-likelihood in nats per text token and per image token, without BPE dropout."""
    text_sum = image_sum = text_count = image_count = 0
    for chunk in chunks(range(len(images.indices)), BATCH):
        tokens = [pipeline.tokenizer.encode(images.captions[i]) for i in chunk]
        text = pipeline.prior.pack_text(tokens, truncate=True).to(pipeline.device)
        codes = images.codes[chunk[0] : chunk[-1] + 1].flatten(1).to(pipeline.device)
        losses = pipeline.prior.loss(text, codes)
        counted = int((pipeline.prior.text_targets(text) != IGNORE).sum())
        text_sum, text_count = text_sum + losses["text"].item() * counted, text_count + counted
        image_sum, image_count = image_sum + losses["image"].item() * codes.numel(), image_count + codes.numel()
    return {
        "captions": len(images.indices),
        "text tokens": text_count,
        "nats per text token": text_sum / text_count,
        "image tokens": image_count,
        "nats per image token": image_sum / image_count,
    }


@torch.inference_mode()
def retrieval(pipeline: Pipeline, sets: dict[str, EvaluationSet]) -> dict:
    """CLIP's top-1 and top-5 retrieval accuracy within each set, image to text and text to image.

    All sets are reduced to the size of the smallest, because retrieval among more items is harder.
    """
    clip = pipeline.clip
    assert clip is not None
    count = min(len(images.indices) for images in sets.values())
    section = {}
    for name, images in sets.items():
        chosen = evenly_spaced(len(images.indices), count)
        captions = [images.captions[i] for i in chosen]
        match = torch.tensor([[one == other for other in captions] for one in captions])
        text = clip.pack_text([pipeline.tokenizer.encode(caption) for caption in captions], truncate=True)
        section[name] = {}
        for kind, pixels in {"images": images.images, "reconstructions": images.reconstructions}.items():
            scores = clip.similarities(pixels[chosen], text)
            for direction, table in {"image to text": scores, "text to image": scores.T}.items():
                rank = retrieval_rank(table, match)
                section[name][f"{kind}, {direction}"] = {
                    f"top-{top}": proportion(int((rank < top).sum()), count) for top in (1, 5)
                }
    return section
