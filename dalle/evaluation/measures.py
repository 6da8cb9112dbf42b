"""What dVAE, prior and CLIP do with real pictures."""

import torch

from dalle.evaluation.pictures import BATCH, PictureSet, chunks, spaced
from dalle.evaluation.statistics import share, ssim
from dalle.generation.pipeline import Pipeline
from dalle.metrics import codebook_usage, outranked, psnr
from dalle.models.prior import IGNORE


def reconstruction(pipeline: Pipeline, group: PictureSet) -> dict:
    """How well the codes carry pictures."""
    real, copies = group.images / 255, group.copies / 255
    vocab = pipeline.dvae.config.vocab
    used, perplexity = codebook_usage(group.codes, vocab)
    similarity = torch.cat([ssim(a, b) for a, b in zip(real.split(BATCH), copies.split(BATCH))])
    return {
        "pictures": len(group.indices),
        "PSNR, dB": psnr(real, copies),
        "SSIM": similarity.mean().item(),
        "codes in use": used,
        "codes": vocab,
        "perplexity": perplexity,
    }


@torch.inference_mode()
def likelihood(pipeline: Pipeline, group: PictureSet) -> dict:
    """The prior's loss in nats per token, on whole captions."""
    text_sum = image_sum = text_count = image_count = 0
    for chunk in chunks(range(len(group.indices)), BATCH):
        tokens = [pipeline.tokenizer.encode(group.captions[i]) for i in chunk]
        text = pipeline.prior.pack_text(tokens, truncate=True).to(pipeline.device)
        codes = group.codes[chunk[0] : chunk[-1] + 1].flatten(1).to(pipeline.device)
        losses = pipeline.prior.loss(text, codes)
        counted = int((pipeline.prior.text_targets(text) != IGNORE).sum())
        text_sum, text_count = text_sum + losses["text"].item() * counted, text_count + counted
        image_sum, image_count = image_sum + losses["image"].item() * codes.numel(), image_count + codes.numel()
    return {
        "captions": len(group.indices),
        "text tokens": text_count,
        "nats per text token": text_sum / text_count,
        "image tokens": image_count,
        "nats per image token": image_sum / image_count,
    }


@torch.inference_mode()
def retrieval(pipeline: Pipeline, groups: dict[str, PictureSet]) -> dict:
    """How often CLIP finds a picture's caption among those of its group, and a caption's picture.

    All groups are cut to the size of the smallest, for the more there are to choose from, the harder it is.
    """
    clip = pipeline.clip
    assert clip is not None
    count = min(len(group.indices) for group in groups.values())
    section = {}
    for name, group in groups.items():
        chosen = spaced(len(group.indices), count)
        captions = [group.captions[i] for i in chosen]
        same = torch.tensor([[one == other for other in captions] for one in captions])
        text = clip.pack_text([pipeline.tokenizer.encode(caption) for caption in captions], truncate=True)
        section[name] = {}
        for kind, pictures in {"pictures": group.images, "reconstructions": group.copies}.items():
            scores = clip.similarities(pictures[chosen], text)
            for direction, table in {"picture to caption": scores, "caption to picture": scores.T}.items():
                ahead = outranked(table, same)
                section[name][f"{kind}, {direction}"] = {
                    f"top-{top}": share(int((ahead < top).sum()), count) for top in (1, 5)
                }
    return section
