"""Conversion of taming-transformers' VQGAN."""

import pytest
import torch
from peers_for_tests import Taming

from dalle.conversion.vqgan import read_vqgan
from dalle.errors import UserError
from dalle.models.checkpoint import load_dvae, save_part
from dalle.models.vqgan import VQGANConfig

CONFIG = VQGANConfig(16, 40, (32, 32, 64), codebook_dim=16)


@pytest.fixture(params=[True, False], ids=["gumbel", "codebook"])
def peer(request):
    torch.manual_seed(11)
    return Taming(request.param, CONFIG.vocab, CONFIG.widths, CONFIG.codebook_dim)


@pytest.fixture
def path(peer, tmp_path):
    """A checkpoint of PyTorch Lightning."""
    state = peer.state_dict() | {"loss.discriminator.main.0.weight": torch.zeros(3)}
    torch.save({"state_dict": state, "epoch": 3, "global_step": 7}, tmp_path / "model.ckpt")
    return tmp_path / "model.ckpt"


def test_codes_and_images(peer, path, tmp_path):
    save_part(tmp_path, "dvae", read_vqgan(path, CONFIG))
    vqgan, peer = load_dvae(tmp_path).double(), peer.double()
    images = torch.rand(3, 3, 16, 24, dtype=torch.float64)
    values, codes = peer.encode(2 * images - 1)
    assert len(codes.unique()) > 5 and torch.equal(vqgan.codes(images), codes)
    logits = vqgan.encode(images)
    if not peer.gumbel:  # distances are logits up to what is the same for all codes; the codebook is float32
        values, logits = -values - (-values)[:, :1], logits - logits[:, :1]
    torch.testing.assert_close(logits, values, rtol=1e-12 if peer.gumbel else 1e-6, atol=1e-12 if peer.gumbel else 1e-5)
    decoded = peer.decode(codes)
    torch.testing.assert_close(vqgan.decoder(codes), decoded, rtol=1e-12, atol=1e-12)
    assert torch.equal(vqgan.decode(codes), ((decoded.float() + 1) / 2).clamp(0, 1))
    assert torch.equal(vqgan.reconstruct(images), vqgan.decode(codes))


def refusal(path):
    with pytest.raises(UserError) as error:
        read_vqgan(path, CONFIG)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_first_tensor_that_differs_is_named(peer, path):
    state = peer.state_dict()
    codebook = "quantize.embed.weight" if peer.gumbel else "quantize.embedding.weight"
    upsample, attention = "decoder.up.1.upsample.conv.bias", "encoder.down.0.attn.0.q.weight"
    for change, message in (
        ({upsample: torch.zeros(5)}, f"{upsample} is [5] there and [32] here"),
        ({attention: torch.zeros(5)}, f"{attention} is [5] there and absent here"),
        ({codebook: torch.zeros(40, 8)}, f"{codebook} is [40, 8] there and [40, 16] here"),
        ({codebook: torch.zeros(40)}, f"{codebook} is [40] there and [40, 16] here"),
    ):
        torch.save(state | change, path)
        assert message in refusal(path)


def test_damaged_and_hostile_files(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert "model.ckpt cannot be read as weights" in refusal(path)
    torch.save({"state_dict": {}, "callbacks": VQGANConfig}, path)
    assert "it names dalle.models.vqgan.VQGANConfig, which weights do not need" in refusal(path)
    torch.save([1, 2], path)
    assert "cannot be read as weights" in refusal(path)
