"""Opening Stable Diffusion models: pipeline folders, and checkpoints in one file."""

import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from diffusers.loaders import single_file
from huggingface_hub.errors import LocalEntryNotFoundError
from ldm_layout import ldm_state
from safetensors.torch import save_file
from tiny_text import TEXT_KINDS

from domainstudio.errors import UserError
from domainstudio.models.codec import VaeCodec
from domainstudio.models.condition import TextCondition
from domainstudio.models.load import load_model

pytest_plugins = "text_kit"


@pytest.mark.parametrize("name", TEXT_KINDS)
def test_text_to_image_folders_are_recognised(text_pipelines, name):
    model = load_model(text_pipelines(name))
    prediction, linear = TEXT_KINDS[name]
    assert model.prediction == {"epsilon": "epsilon", "v_prediction": "v"}[prediction]
    assert model.network.config.use_linear_projection == linear
    assert (type(model.codec), type(model.condition)) == (VaeCodec, TextCondition)
    assert model.codec.scale == 0.18215
    assert (model.resolution, model.sample_shape, model.learned_variance) == (16, (4, 8, 8), False)
    alphas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square().neg().add(1).cumprod(0)
    torch.testing.assert_close(model.schedule.alphas_cumprod.double(), alphas, rtol=1e-5, atol=0)
    for module in (model.network, model.condition.text_encoder, model.codec.vae):
        assert not module.training
        assert {(p.requires_grad, p.dtype) for p in module.parameters()} == {(False, torch.float32)}


def test_the_safety_checker_is_not_opened(text_pipelines, tmp_path):
    """It is as large as the model: here it is named and missing, which opening it would stumble over."""
    folder = shutil.copytree(text_pipelines("sd1_epsilon"), tmp_path / "named")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert load_model(folder).pipeline.safety_checker is None


def test_other_pipelines_of_text_models_are_refused(text_pipelines, tmp_path):
    pipeline = load_model(text_pipelines("sd1_epsilon")).pipeline
    StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False).save_pretrained(tmp_path / "p")
    with pytest.raises(
        UserError, match=r"is a StableDiffusionImg2ImgPipeline; taken are .*\(StableDiffusionPipeline\)"
    ):
        load_model(tmp_path / "p")


class TestSingleFiles:
    @pytest.fixture
    def configured(self, text_pipelines, monkeypatch):
        """Lets diffusers find a model's configuration in a folder, as it finds those of 1.x and 2.x on the hub."""

        def configure(name: str) -> Path:
            found = {"pretrained_model_name_or_path": str(text_pipelines(name))}
            monkeypatch.setattr(single_file, "fetch_diffusers_config", lambda checkpoint: found)
            return text_pipelines(name)

        return configure

    @pytest.mark.parametrize("name", ["sd1_epsilon", "sd2_v"])
    @pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
    def test_a_checkpoint_is_the_model_it_was_made_of(self, configured, text_models, tmp_path, name, suffix):
        configured(name)
        model, file = text_models(name), tmp_path / f"model{suffix}"
        with torch.no_grad():
            for part in (model.network, model.codec.vae, model.condition.text_encoder):
                for p in part.parameters():  # so that the weights can only be those of the file
                    p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        state = ldm_state(model.pipeline)
        torch.save({"state_dict": state}, file) if suffix == ".ckpt" else save_file(state, file)
        opened = load_model(file)
        assert (opened.prediction, opened.resolution) == (model.prediction, 16)
        assert opened.pipeline.safety_checker is None
        for part in ("unet", "vae", "text_encoder"):
            theirs, ours = (getattr(m.pipeline, part).state_dict() for m in (opened, model))
            assert theirs.keys() == ours.keys()
            assert all(torch.equal(theirs[key], ours[key]) for key in ours)
        assert torch.equal(opened.encode_prompts(["a red dog"]), model.encode_prompts(["a red dog"]))

    def test_a_given_configuration_is_taken_instead_of_a_guess(self, text_models, text_pipelines, tmp_path):
        save_file(ldm_state(text_models("sd2_v").pipeline), tmp_path / "model.safetensors")
        assert load_model(tmp_path / "model.safetensors", config=text_pipelines("sd2_v")).prediction == "v"

    def test_a_folder_has_its_own_configuration(self, text_pipelines):
        with pytest.raises(UserError, match="is for a model in a single file"):
            load_model(text_pipelines("sd1_epsilon"), config=text_pipelines("sd2_v"))

    def test_offline_it_is_said_where_the_configuration_comes_from(self, text_models, tmp_path, monkeypatch):
        def offline(*args, **kwargs):
            raise LocalEntryNotFoundError("the hub cannot be reached")

        monkeypatch.setattr(single_file, "_download_diffusers_model_config_from_hub", offline)
        save_file(ldm_state(text_models().pipeline), tmp_path / "model.safetensors")
        with pytest.raises(
            UserError,
            match=r"model\.safetensors'.*cannot be reached.*the pipeline folder that single_file_config names",
        ):
            load_model(tmp_path / "model.safetensors")

    @pytest.mark.parametrize("suffix", [".bin", ".pt", ".gguf", ".zip", ""])
    def test_other_files_are_refused_unopened(self, tmp_path, suffix):
        (tmp_path / f"model{suffix}").write_bytes(b"whatever")
        with pytest.raises(UserError, match=r"is not a model: give a pipeline folder, or a \.safetensors or \.ckpt"):
            load_model(tmp_path / f"model{suffix}")

    @pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
    @pytest.mark.parametrize("content", [b"", b"version https://git-lfs", b"not a model", bytes(range(256)) * 40])
    def test_broken_files_are_told(self, configured, tmp_path, suffix, content):
        configured("sd1_epsilon")
        (tmp_path / f"model{suffix}").write_bytes(content)
        with pytest.raises(UserError, match="could not load a diffusers pipeline"):
            load_model(tmp_path / f"model{suffix}")

    @pytest.mark.parametrize("left_out", ["model.diffusion_model.", "first_stage_model.", "cond_stage_model.", ""])
    def test_files_that_lack_a_part_of_the_model_are_told(self, configured, text_models, tmp_path, left_out):
        """`""` leaves nothing: the file holds something else, such as a LoRA."""
        configured("sd1_epsilon")
        state = ldm_state(text_models().pipeline)
        kept = {name: tensor for name, tensor in state.items() if not name.startswith(left_out)}
        save_file(kept or {"lora_unet_x.alpha": torch.ones(1)}, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match="could not load a diffusers pipeline"):
            load_model(tmp_path / "model.safetensors")

    def test_weights_of_another_size_are_told(self, configured, text_models, tmp_path):
        configured("sd1_epsilon")
        state = ldm_state(text_models().pipeline)
        state["model.diffusion_model.out.2.weight"] = torch.zeros(4, 9, 3, 3)
        save_file(state, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match="could not load a diffusers pipeline"):
            load_model(tmp_path / "model.safetensors")

    @pytest.mark.parametrize("zipped", [True, False])
    def test_a_pickle_is_never_run(self, configured, tmp_path, zipped):
        configured("sd1_epsilon")
        ran, file = tmp_path / "ran", tmp_path / "model.ckpt"

        class Malicious:
            def __reduce__(self):
                return Path.touch, (ran,)

        content = pickle.dumps({"state_dict": Malicious()}, protocol=2)
        file.write_bytes(content)
        if zipped:  # as torch.save writes
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("model/data.pkl", content)
                archive.writestr("model/version", "3\n")
        with pytest.raises(UserError, match="could not load a diffusers pipeline"):
            load_model(file)
        assert not ran.exists()
        pickle.loads(content)
        assert ran.exists(), "the pickle is as malicious as it is said to be"
