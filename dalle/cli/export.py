"""`dalle export`."""

from dataclasses import dataclass
from pathlib import Path

from dalle.cli.parsing import parse
from dalle.errors import UserError
from dalle.files import writable_directory
from dalle.generation.pipeline import Pipeline


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Copies the parts of a model that generation needs, with weights in float16, ready to share or upload.

    The dVAE, the smallest part, stays in float32: rounding it would change some of the codes that the prior learned.
    """

    model: Path
    """Directory of a trained model."""
    out: Path
    """Directory to write, other than that of the model."""


def main(argv: list[str]) -> int:
    config = parse(ExportConfig, "export", argv)
    if config.out.resolve() == config.model.resolve():
        raise UserError(f"--out {config.out} is the model itself, whose weights would be rounded: choose another --out")
    if checkpoint := next(config.out.glob("*.run.safetensors"), None):
        raise UserError(f"{checkpoint} is a training checkpoint, whose model would be replaced: choose another --out")
    pipeline = Pipeline.from_pretrained(config.model)
    for model in (pipeline.prior, pipeline.clip):
        if model is not None:
            model.half()
    out = writable_directory(config.out)
    pipeline.save_pretrained(out)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    print(f"{out}: {size / 1e6:.1f} MB of weights")
    return 0
