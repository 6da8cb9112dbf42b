"""Converts a model of another project to a model directory."""

import os
from collections.abc import Callable
from pathlib import Path

from dalle.conversion.mindalle import read_mindalle, read_tokenizer
from dalle.conversion.openai_dvae import read_openai_dvae
from dalle.conversion.rudalle import read_rudalle
from dalle.conversion.vqgan import read_vqgan
from dalle.conversion.yttm import read_yttm
from dalle.errors import UserError
from dalle.files import sole_writer, writable_directory
from dalle.generation.pipeline import Pipeline
from dalle.models.checkpoint import fingerprint, load_dvae, save_part
from dalle.models.dvae import DiscreteVAE
from dalle.models.vqgan import VQGANConfig


def convert(kind: str, path: str | os.PathLike, out: str | os.PathLike) -> None:
    """Writes a model directory with the weights of another project.

    Args:
        kind: whose weights.
            "openai-dvae": OpenAI's `encoder.pkl` and `decoder.pkl`, a dVAE alone.
            "rudalle": a model of ruDALL-E, Malevich, Kandinsky or one trained from them, of version 2 or 3:
            `pytorch_model*.bin`, `vqgan*.ckpt` and `bpe.model`.
            "mindalle": minDALL-E, the unpacked archive: `stage1_last.ckpt`, `stage2_last.ckpt` and `tokenizer/`.
        path: directory of the files, under their original names. Nothing in them is executed.
        out: directory to write; it must not hold another model.

    Raises:
        UserError: a file is missing, damaged or of another model, or `out` cannot be written or holds another model.
    """
    if kind not in CONVERSIONS:
        raise UserError(f"{kind!r} is not a kind of model: choose one of {', '.join(CONVERSIONS)}")
    if not Path(path).is_dir():
        raise UserError(f"{path} is not a directory: give the one that holds the files of the model")
    out = writable_directory(Path(out))
    with sole_writer(out, *PARTS):
        if part := next((name for name in ("prior", "clip") if (out / f"{name}.json").exists()), None):
            raise UserError(f"{out} holds a model ({part}.json), which would be replaced: choose another directory")
        model = CONVERSIONS[kind](Path(path))
        dvae = model.dvae if isinstance(model, Pipeline) else model
        # The same dVAE is that of a conversion that ended early.
        if (out / "dvae.json").exists() and fingerprint(load_dvae(out)) != fingerprint(dvae):
            raise UserError(f"{out} holds another dVAE, which would be replaced: choose another directory")
        if isinstance(model, Pipeline):
            model.save_pretrained(out)
        else:
            save_part(out, "dvae", model)


def _rudalle(path: Path) -> Pipeline:
    weights, vqgan, tokenizer = (_only(path, pattern) for pattern in ("pytorch_model*.bin", "vqgan*.ckpt", "bpe.model"))
    config = VQGANConfig.preset("rudalle")
    return Pipeline(read_vqgan(vqgan, config), read_rudalle(weights), read_yttm(tokenizer))


def _mindalle(path: Path) -> Pipeline:
    names = "stage1_last.ckpt", "stage2_last.ckpt", "tokenizer/bpe-16k-vocab.json", "tokenizer/bpe-16k-merges.txt"
    vqgan, weights, vocab, merges = (path / name for name in names)
    tokenizer, padding = read_tokenizer(vocab, merges)
    config = VQGANConfig.preset("mindalle")
    return Pipeline(read_vqgan(vqgan, config), read_mindalle(weights, padding), tokenizer)


def _only(directory: Path, pattern: str) -> Path:
    """The one file of a directory whose name matches; raises a UserError if there is none or several."""
    found = sorted(directory.glob(pattern))
    if len(found) != 1:
        raise UserError(f"{directory} must hold one file {pattern}, not {', '.join(p.name for p in found) or 'none'}")
    return found[0]


PARTS = ("dvae", "prior", "tokenizer", "clip")
CONVERSIONS: dict[str, Callable[[Path], DiscreteVAE | Pipeline]] = {
    "openai-dvae": read_openai_dvae,
    "rudalle": _rudalle,
    "mindalle": _mindalle,
}
