"""Optional stage between dVAE and prior: trains the decoder on discrete codes, without relaxation."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dalle.errors import UserError
from dalle.models.checkpoint import fingerprint
from dalle.models.dvae import DiscreteVAE, logit_laplace_nll
from dalle.runtime import OnStep
from dalle.training.init import init_directory
from dalle.training.loop import Result, output_directory, train
from dalle.training.train_dvae import PixelConfig, PixelTask, load_trainable


@dataclass(frozen=True, kw_only=True)
class TrainDecoderConfig(PixelConfig):
    """Trains the decoder of a dVAE further, or a larger one, on the codes of its frozen encoder.

    In joint training the decoder sees mixtures of codes; here it sees one code per position, as the prior generates
    them. The codes of `dalle tokenize` stay valid, so this can run in parallel with the training of the prior.
    """

    widths: tuple[int, ...] | None = None
    """Channels of the decoder's groups, highest resolution first; by default unchanged. A decoder of another size is
    trained from scratch."""
    blocks: int | None = None
    """Residual blocks per group of the decoder; by default unchanged."""


class DecoderTask(PixelTask[TrainDecoderConfig]):
    """The task of the training loop for a dVAE with a frozen encoder."""

    name = "decoder"

    def initial_model(self) -> DiscreteVAE:
        trained = load_trainable(init_directory(self.config) or self.config.out)
        widths, blocks = trained.config.decoder_size
        widths = widths if self.config.widths is None else self.config.widths
        blocks = blocks if self.config.blocks is None else self.config.blocks
        model = DiscreteVAE(replace(trained.config, decoder_widths=widths, decoder_blocks=blocks))
        if model.config.decoder_size == trained.config.decoder_size:
            model = trained
        model.encoder = trained.encoder.requires_grad_(False)
        return model

    def losses(self, step: int, fraction: float) -> dict[str, Tensor]:
        images = self.loader.batch(step).images.to(self.device, non_blocking=True)
        with torch.no_grad():
            codes = self.model.codes(images)
        nll = logit_laplace_nll(self.model.targets(images), self.model.decoder.from_codes(codes).float()).mean()
        return {"loss": nll}

    def write_model(self, model: nn.Module, done: bool) -> None:
        if done:  # until then the previous decoder may be better
            super().write_model(model, done)


def train_decoder(config: TrainDecoderConfig, *, on_step: OnStep | None = None) -> Result:
    """Trains a decoder; `on_step` receives the progress. Raises UserError for invalid input."""
    with output_directory(config, "decoder", writes=("dvae", "decoder")):
        if config.init is not None and (config.out / "dvae.json").exists() and not config.resume:
            raise UserError(
                f"{config.out} holds a dVAE, which would be replaced: choose another --out, or omit --init to train "
                "its decoder further"
            )
        task = DecoderTask(config)
        identity = task.identity | {"encoder": fingerprint(task.model.encoder)}
        return replace(train(task, config, identity, on_step), skipped=task.skipped)
