"""The smallest trained model: every kind of file in one directory."""

from dalle import CLIPConfig, DiscreteVAEConfig, PriorConfig
from dalle.training.tokens import TokenizeConfig, tokenize
from dalle.training.train_clip import TrainCLIPConfig, train_clip
from dalle.training.train_dvae import TrainDVAEConfig, train_dvae
from dalle.training.train_prior import TrainPriorConfig, train_prior

DATA = "shapes-simple:24"
DVAE = DiscreteVAEConfig(16, 32, (8, 8, 8), blocks=1, codebook_dim=8)
PRIOR = PriorConfig(12, 256, (4, 4), 32, layers=2, heads=2, head_dim=8, conv_kernel=3)
CLIP = CLIPConfig(16, 12, 256, (8, 8), text_width=16, text_layers=1, text_heads=2, embedding_dim=8)
SHORT = dict(steps=2, batch_size=4, log_every=1, eval_every=0, threads=1)


def run_dvae(out, on_step=None, **change):
    return train_dvae(TrainDVAEConfig(out=out, **dict(model=DVAE, data=DATA) | SHORT | change), on_step=on_step)


def run_tokenize(out, **change):
    return tokenize(TokenizeConfig(out=out, **dict(data=DATA, text_vocab=300) | change))


def run_prior(out, on_step=None, **change):
    return train_prior(TrainPriorConfig(out=out, **dict(model=PRIOR) | SHORT | change), on_step=on_step)


def run_clip(out, on_step=None, **change):
    return train_clip(TrainCLIPConfig(out=out, **dict(model=CLIP, data=DATA) | SHORT | change), on_step=on_step)


def build(out):
    """Trains a model of every part."""
    for stage in (run_dvae, run_tokenize, run_prior, run_clip):
        stage(out)
