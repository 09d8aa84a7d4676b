import pytest
import torch
from diffusers import VQModel

from domainstudio.models.codec import PixelCodec, VaeCodec

SCALE, SHIFT = 0.5, 0.1  # of tiny_models.tiny_vae


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def codec(models) -> VaeCodec:
    return models("latent_epsilon").codec


def test_pixels_are_left_as_they_are(images):
    codec = PixelCodec()
    assert codec.draw(codec.encode(images), torch.Generator()) is images
    assert codec.decode(images) is images


def test_scale_and_shift_are_applied_on_encoding(codec, images):
    with torch.no_grad():
        posterior = codec.vae.encode(images).latent_dist
    mean, std = codec.encode(images).chunk(2, dim=1)
    torch.testing.assert_close(mean, (posterior.mean - SHIFT) * SCALE)
    torch.testing.assert_close(std, posterior.std * SCALE)


def test_scale_and_shift_are_undone_on_decoding(codec, images):
    with torch.no_grad():
        raw = codec.vae.decode(codec.vae.encode(images).latent_dist.mean).sample
        ours = codec.decode(codec.encode(images)[:, :4])
    torch.testing.assert_close(ours, raw, rtol=1e-4, atol=1e-5)


def test_a_draw_is_the_autoencoders_own_sample_in_model_space(codec, images):
    with torch.no_grad():
        own = codec.vae.encode(images).latent_dist.sample(torch.Generator().manual_seed(5))
    drawn = codec.draw(codec.encode(images), torch.Generator().manual_seed(5))
    torch.testing.assert_close(drawn, (own - SHIFT) * SCALE)


def test_a_draw_follows_from_the_generator_alone(codec, images):
    encoded = codec.encode(images)
    first, again, other = (codec.draw(encoded, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_encoding_has_no_gradient_and_decoding_has(codec, images):
    assert not codec.encode(images.requires_grad_()).requires_grad
    latent = torch.zeros(1, 4, 16, 16, requires_grad=True)
    codec.decode(latent).sum().backward()
    assert latent.grad is not None
    assert latent.grad.abs().sum() > 0
    assert all(p.grad is None for p in codec.vae.parameters()), "the autoencoder is frozen"


def test_vq_models_have_no_spread(images):
    vq = VQModel(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        num_vq_embeddings=8,
        scaling_factor=0.3,
    )
    codec = VaeCodec(vq)
    encoded = codec.encode(images)
    assert torch.equal(encoded[:, 4:], torch.zeros(3, 4, 16, 16))
    with torch.no_grad():
        latents = vq.encode(images).latents
        torch.testing.assert_close(codec.draw(encoded, torch.Generator()), latents * 0.3)
        torch.testing.assert_close(codec.decode(latents * 0.3), vq.decode(latents).sample, rtol=1e-4, atol=1e-4)


def test_an_autoencoder_without_scale_or_shift_is_used_as_it_is(codec, images):
    vae = codec.vae
    vae.register_to_config(scaling_factor=None, shift_factor=None)
    plain = VaeCodec(vae)
    with torch.no_grad():
        torch.testing.assert_close(plain.encode(images)[:, :4], vae.encode(images).latent_dist.mean)
