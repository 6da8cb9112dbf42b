"""Between the stages: a decoder for codes as they are drawn, without relaxation."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dalle.models.checkpoint import fingerprint, load_dvae
from dalle.models.dvae import DiscreteVAE, logit_laplace_nll
from dalle.runtime import OnStep
from dalle.training.loop import Result, train
from dalle.training.train_dvae import PixelConfig, PixelTask


@dataclass(frozen=True, kw_only=True)
class TrainDecoderConfig(PixelConfig):
    """Trains the decoder of a dVAE further, or a larger one, on the codes of its encoder, which stays as it is.

    While encoder and decoder train together, the decoder sees mixtures of codes; here it sees what the prior draws: one
    code at every position. The codes of `dalle tokenize` stay valid, so this can run beside the training of the prior.
    """

    widths: tuple[int, ...] | None = None
    """Channels of the decoder's groups, those of whole pixels first; by default as they are. A decoder of another size
    than the one there is starts anew."""
    blocks: int | None = None
    """Residual blocks in a group of the decoder; by default as many as there are."""


class DecoderTask(PixelTask[TrainDecoderConfig]):
    """The dVAE with a frozen encoder, for the shared loop."""

    name = "decoder"

    def start(self) -> DiscreteVAE:
        known = load_dvae(self.config.out)
        widths, blocks = known.config.decoder_size
        widths = widths if self.config.widths is None else self.config.widths
        blocks = blocks if self.config.blocks is None else self.config.blocks
        model = DiscreteVAE(replace(known.config, decoder_widths=widths, decoder_blocks=blocks))
        if model.config.decoder_size == known.config.decoder_size:
            model = known
        model.encoder = known.encoder.requires_grad_(False)
        return model

    def losses(self, step: int, fraction: float) -> dict[str, Tensor]:
        pictures = self.pictures.batch(step).pictures.to(self.device, non_blocking=True)
        with torch.no_grad():
            codes = self.model.codes(pictures)
        nll = logit_laplace_nll(self.model.targets(pictures), self.model.decoder.from_codes(codes).float()).mean()
        return {"loss": nll}

    def write_model(self, model: nn.Module, done: bool) -> None:
        if done:  # until then the decoder there is may be the better one
            super().write_model(model, done)


def train_decoder(config: TrainDecoderConfig, *, on_step: OnStep | None = None) -> Result:
    """Trains a decoder; `on_step` receives Progress. Raises UserError for what the user can mend."""
    task = DecoderTask(config)
    identity = {"pictures": task.count, "encoder": fingerprint(task.model.encoder)}
    return replace(train(task, config, identity, on_step), skipped=task.skipped)
