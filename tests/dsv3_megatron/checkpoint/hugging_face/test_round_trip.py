"""There and back: published FP8 comes out as it went in; transformers' own folders; what an export may overwrite."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import dsv3_megatron.checkpoint.hugging_face.export as export_module
from dsv3_megatron.checkpoint.hugging_face.export import INDEX, Scales, as_stored, export, shards_of
from dsv3_megatron.checkpoint.hugging_face.import_ import import_weights
from dsv3_megatron.checkpoint.hugging_face.names import published_tensors
from dsv3_megatron.checkpoint.hugging_face.published_scales import kept_scales
from dsv3_megatron.checkpoint.hugging_face.sources import find_sources
from dsv3_megatron.precision.weights import dequantise_weight
from launcher import export_hf, import_hf
from launcher.command_line.compose import compose, resolved_yaml
from parallel.errors import CheckpointError
from testing.published import TINY, fp8, imported, published
from testing.training.tiny import SMALL

# Several blocks of 128 a matrix, the last of them partial, as of the 576 rows of the published models.
WIDE = TINY.model_copy(
    update={"hidden_size": 136, "intermediate_size": 264, "moe_intermediate_size": 136, "kv_lora_rank": 130}
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """A recipe without text: an import's rest."""
    path = tmp_path_factory.mktemp("recipe") / "synthetic.yaml"
    path.write_text(resolved_yaml(compose([*SMALL])))
    return path


def bring(folder, run, recipe, *words):
    return import_hf.main([f"input={folder}", f"output={run}", f"recipe={recipe}", "processes=1", *words])


def take(run, output, *words):
    """Return (tensors, configuration) of an export."""
    assert export_hf.main([f"run={run}", f"output={output}", "processes=1", *words]) == 0
    tensors = {name: values for file in output.glob("*.safetensors") for name, values in load_file(file).items()}
    return tensors, json.loads((output / "config.json").read_text())


def bits(values):
    return values.contiguous().view(torch.uint8)


SCALES = {
    "float": {"power_of_two": False},
    "powers of two": {"power_of_two": True},
    "exponents": {"power_of_two": True, "scale_dtype": torch.float8_e8m0fnu},
}


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kind", SCALES)
def test_fp8_that_nobody_trained_comes_out_to_the_bit(kind, dtype, recipe, tmp_path):
    made = published(WIDE)
    fp8(made, **SCALES[kind])
    said = made.config["quantization_config"]
    if SCALES[kind]["power_of_two"]:
        said["scale_fmt"] = "ue8m0"
    bring(made.write(tmp_path / "published"), tmp_path / "run", recipe, f"dtype={dtype}")
    tensors, config = take(tmp_path / "run", tmp_path / "exported", "dtype=fp8")
    assert config["quantization_config"] == said
    assert tensors.keys() == made.tensors.keys()
    for name, values in made.tensors.items():
        assert tensors[name].dtype == values.dtype and torch.equal(bits(tensors[name]), bits(values)), name


def test_scales_are_chosen_anew_where_they_are_asked_for(recipe, tmp_path):
    made = published(WIDE)
    expected = fp8(made)
    made.config["quantization_config"]["scale_fmt"] = "ue8m0"
    bring(made.write(tmp_path / "published"), tmp_path / "run", recipe)
    tensors, config = take(tmp_path / "run", tmp_path / "float", "dtype=fp8", "scales=float")
    assert "scale_fmt" not in config["quantization_config"]
    name = "model.layers.0.self_attn.o_proj.weight"
    for i, j in ((0, 0), (1, 0)):
        block = expected[name][128 * i : 128 * i + 128, 128 * j : 128 * j + 128]
        scale = tensors[f"{name}_scale_inv"][i, j]
        assert scale.item() == pytest.approx(block.abs().max().item() / 448, rel=1e-6)


def test_a_block_that_was_trained_stays_within_what_its_scales_can_hold(tmp_path):
    """Exponents alone: another scale than a power of two would be rounded, and its numbers be others."""
    tensor = next(t for t in published_tensors(WIDE) if t.name.endswith("0.self_attn.o_proj.weight"))
    kept = tmp_path / "kept.safetensors"
    grid = tuple(-(-size // 128) for size in tensor.shape)
    save_file({tensor.name: torch.ones(grid).to(torch.float8_e8m0fnu)}, kept)
    weight = torch.randn(tensor.shape) * 0.02
    found = as_stored(tensor, weight, "fp8", Scales(power_of_two=False, kept=kept))
    data, scales = found[tensor.name], found[f"{tensor.name}_scale_inv"]
    assert scales.dtype == torch.float8_e8m0fnu
    difference = dequantise_weight(data, scales, torch.float32) - weight
    assert difference.abs().max() <= weight.abs().max() * 2**-4


def test_powers_of_two_can_be_asked_for(recipe, tmp_path):
    made = published(WIDE)
    bring(made.write(tmp_path / "published"), tmp_path / "run", recipe)
    tensors, config = take(tmp_path / "run", tmp_path / "exported", "dtype=fp8", "scales=power_of_two")
    assert config["quantization_config"]["scale_fmt"] == "ue8m0"
    scales = [values for name, values in tensors.items() if name.endswith("_scale_inv")]
    assert scales and all((values.frexp().mantissa == 0.5).all() for values in scales)
    with pytest.raises(CheckpointError, match="scales = float has no effect with dtype = bf16"):
        take(tmp_path / "run", tmp_path / "exported", "dtype=bf16", "scales=float")


def test_another_import_forgets_the_scales_of_the_first(recipe, tmp_path):
    first, second = published(WIDE), published(WIDE)
    fp8(first)
    bring(first.write(tmp_path / "first"), tmp_path / "run", recipe)
    assert (tmp_path / "run/published_scales.safetensors").exists()
    bring(second.write(tmp_path / "second"), tmp_path / "run", recipe)
    assert not (tmp_path / "run/published_scales.safetensors").exists()


# -- transformers ------------------------------------------------------------------------------------------------------


def theirs(name, model=TINY):
    """Return a random model of a class of transformers with the shape of ours."""
    import transformers

    values = {key: value for key, value in model.model_dump().items() if key not in ("rope_scaling", "rms_norm_eps")}
    config = {**values, "num_key_value_heads": model.num_attention_heads, "pad_token_id": None, "eos_token_id": 1}
    torch.manual_seed(0)
    found = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**config))
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.normal_(0, 0.1)
        for key, buffer in found.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.normal_(0, 0.1)
    return found


@pytest.mark.parametrize("stacked", [False, True], ids=["an expert a tensor", "stacked experts"])
@pytest.mark.parametrize("name", ["DeepseekV3", "Glm4MoeLite"])
def test_what_transformers_saves_is_read_and_what_is_written_it_reads(name, stacked, tmp_path):
    model = theirs(name)
    model.save_pretrained(tmp_path / "saved", save_original_format=not stacked)
    config = json.loads((tmp_path / "saved/config.json").read_text())
    sources = find_sources(TINY, tmp_path / "saved", config)
    assert sources.model.num_nextn_predict_layers == 0 and "no weights of more MTP" in sources.told[0]
    import_weights(sources, tmp_path / "run/checkpoints", recipe="", dtype=None, processes=1)
    found, state = imported(tmp_path / "run", sources.model), model.state_dict()
    for key, values in found.items():
        place, _, rest = key.partition(".experts.")
        if rest:
            expert, part = rest.removesuffix("_proj.weight").split(".")
            stack = state[f"{place}.experts.{'down' if part == 'down' else 'gate_up'}_proj"][int(expert)]
            half = {"gate": stack[:16], "up": stack[16:], "down": stack}[part]
            assert torch.equal(values, half), key
        else:
            assert torch.equal(values, state[key]), key
    (folder := tmp_path / "saved again").mkdir()
    checkpoint = tmp_path / "run/checkpoints/step_00000000"
    export(shards_of(sources.model, checkpoint, folder, dtype="fp32", shard_bytes=50_000), folder, processes=1)
    (tmp_path / "saved again/config.json").write_text(json.dumps(config))
    again = type(model).from_pretrained(tmp_path / "saved again", dtype=torch.float32).state_dict()
    assert again.keys() == state.keys() and all(torch.equal(again[key], state[key]) for key in state)


@pytest.mark.parametrize("stacked", [False, True], ids=["as published", "as transformers names them"])
def test_the_text_model_of_a_larger_one_that_transformers_saves_is_read(stacked, tmp_path):
    from transformers.models.kimi_k25.configuration_kimi_k25 import Kimi_K25Config
    from transformers.models.kimi_k25.modeling_kimi_k25 import Kimi_K25ForConditionalGeneration

    text = theirs("DeepseekV3")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "pos_emb_height": 4, "pos_emb_width": 4}
    vision = {**sizes, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Kimi_K25Config(
        text_config=text.config.to_dict(), vision_config=vision, projection_hidden_size=128, tie_word_embeddings=False
    )
    larger = Kimi_K25ForConditionalGeneration(config)
    larger.model.language_model.load_state_dict(text.model.state_dict())
    larger.lm_head.load_state_dict(text.lm_head.state_dict())
    larger.save_pretrained(tmp_path / "saved", save_original_format=not stacked)
    sources = find_sources(TINY, tmp_path / "saved", json.loads((tmp_path / "saved/config.json").read_text()))
    assert any("tensors of vision_tower are left out" in line for line in sources.told)
    import_weights(sources, tmp_path / "run/checkpoints", recipe="", dtype=None, processes=1)
    found = imported(tmp_path / "run", sources.model)
    text.save_pretrained(tmp_path / "text")
    expected = load_file(tmp_path / "text/model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], values) for name, values in expected.items())


# -- the folder of an export -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    bring(published().write(place / "published"), place / "run", recipe)
    return place / "run"


def another_model(folder, run, recipe):
    published(seed=1).write(folder)


def another_configuration(folder, run, recipe):
    folder.mkdir()
    (folder / "config.json").write_text("{}")


def a_pickle(folder, run, recipe):
    folder.mkdir()
    (folder / "pytorch_model.bin").touch()


def another_run(folder, run, recipe):
    bring(published(seed=1).write(folder.with_name("published")), folder.with_name("other run"), recipe)
    take(folder.with_name("other run"), folder)


@pytest.mark.parametrize("there", [another_model, another_configuration, a_pickle, another_run])
def test_files_of_another_model_are_not_touched(there, run, recipe, tmp_path):
    folder = tmp_path / "exported"
    there(folder, run, recipe)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match=r"output = .* holds .* of another model; name a new folder") as error:
        take(run, folder)
    assert "\n" not in error.value.args[0]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_run_and_its_published_weights_need_folders_of_their_own(run, recipe, tmp_path):
    with pytest.raises(CheckpointError, match="is the directory of a run; name a new folder"):
        take(run, run)
    folder = published().write(tmp_path / "published")
    with pytest.raises(CheckpointError, match="holds a published model, and no run; name a new folder"):
        bring(folder, folder, recipe)
    assert not (folder / "recipe.yaml").exists()


def test_an_export_of_the_same_run_is_replaced(run, tmp_path):
    folder = tmp_path / "exported"
    folder.mkdir()
    (folder / "README.md").write_text("of a repository that is new")
    take(run, folder, "shard=20KiB")
    tensors, _ = take(run, folder, "dtype=fp32")
    assert all(values.dtype == torch.float32 for values in tensors.values())
    assert (folder / INDEX).exists() and (folder / "README.md").exists()


def test_files_beside_an_earlier_export_that_it_has_not_written_are_not_touched(run, tmp_path):
    folder = tmp_path / "exported"
    for name in ("model-00001-of-00009.safetensors", "adapter.safetensors", "config.json"):
        take(run, folder)
        (folder / name).write_text("of another model")
        with pytest.raises(CheckpointError, match=f"holds {name}, which no export of this run has written"):
            take(run, folder)
        assert (folder / name).read_text() == "of another model"
        shutil.rmtree(folder)


def test_an_export_that_was_stopped_before_its_mark_goes_on(run, tmp_path, monkeypatch):
    folder = tmp_path / "exported"
    with monkeypatch.context() as patch:
        patch.setattr(export_module, "mark_done", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            take(run, folder, "shard=20KiB")
    assert len(list(folder.glob("*.safetensors"))) == 1 and not list(folder.glob(".*.done"))
    take(run, folder)
    assert (folder / INDEX).exists() and len(list(folder.glob("*.safetensors"))) == 1


def test_nothing_is_written_through_a_link(run, tmp_path):
    folder, outside = tmp_path / "exported", tmp_path / "outside"
    folder.mkdir()
    outside.write_text("precious")
    (folder / ".model-00001-of-00001.safetensors.partial").symlink_to(outside)
    (folder / ".exported.json.tmp").symlink_to(outside)
    take(run, folder)
    for name in ("config.json", "model-00001-of-00001.safetensors"):
        (folder / name).unlink()
        (folder / name).symlink_to(outside)
        with pytest.raises(CheckpointError, match=f"holds {name}"):
            take(run, folder)
        (folder / name).unlink()
    assert outside.read_text() == "precious"


def test_files_of_an_export_have_the_permissions_of_the_umask(run, tmp_path):
    before = os.umask(0o027)
    try:
        take(run, tmp_path / "exported")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "exported").iterdir()} == {0o640}


def test_an_export_that_is_refused_leaves_the_earlier_one_alone(run, tmp_path):
    take(run, tmp_path / "exported")
    before = {path.name: path.read_bytes() for path in (tmp_path / "exported").iterdir()}
    with pytest.raises(CheckpointError, match="ema"):
        take(run, tmp_path / "exported", "weights=ema", "dtype=fp32")
    assert {path.name: path.read_bytes() for path in (tmp_path / "exported").iterdir()} == before


@pytest.mark.parametrize(
    "scales", [torch.ones(3, 1), torch.ones(1, 1).double(), torch.zeros(1, 1), torch.full((1, 1), float("nan"))]
)
def test_kept_scales_that_are_none_of_the_weight_are_refused(tmp_path, scales):
    save_file({"a": scales}, tmp_path / "scales.safetensors")
    with pytest.raises(CheckpointError, match=r"scales.safetensors cannot be read .*; import the weights again"):
        kept_scales(tmp_path / "scales.safetensors", "a", (1, 1))
