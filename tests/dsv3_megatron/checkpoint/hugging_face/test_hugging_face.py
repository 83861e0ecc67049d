"""Export and import of Hugging Face weights of a run, against transformers, and damage."""

import json
import math
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dsv3_megatron.checkpoint.hugging_face.export import INDEX
from dsv3_megatron.checkpoint.hugging_face.names import from_hugging_face, published_tensors
from dsv3_megatron.checkpoint.hugging_face.regions import Regions
from dsv3_megatron.checkpoint.manifest import newest_valid
from dsv3_megatron.checkpoint.save import Saver
from dsv3_megatron.inference.generate import continue_tokens
from dsv3_megatron.inference.trained_model import trained_model
from dsv3_megatron.model.stage import forward_logits
from dsv3_megatron.precision.weights import dequantise_weight
from dsv3_megatron.train.build import build_parts
from launcher import export_hf, import_hf
from launcher.command_line.compose import compose, load_resolved, resolved_yaml
from parallel.errors import CheckpointError
from parallel.groups import start_processes, stop_processes
from parallel.world import World
from testing.training.tiny import SMALL


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory with a checkpoint of random weights, norms and biases too, MTP of depth 2."""
    directory = tmp_path_factory.mktemp("hf") / "run"
    words = [*SMALL, "model.num_nextn_predict_layers=2", "model.v_head_dim=24", f"run.directory={directory}"]
    recipe = compose([*words, "data=stdlib", "model.vocab_size=512", "data.sequence_length=64"])
    directory.mkdir(parents=True)
    (directory / "recipe.yaml").write_text(resolved_yaml(recipe))
    start_processes(World(0, 1, 0), torch.device("cpu"))
    try:
        parts = build_parts(recipe, recipe.layout(1), torch.device("cpu"))
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in parts.whole_model.parameters():
                parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1)
            for name, buffer in parts.whole_model.named_buffers():
                if name.endswith("expert_bias"):
                    buffer.normal_(0.0, 0.05)
        parts.optimizer.reload_model_params()
        saver = Saver(directory / "checkpoints", recipe.checkpoint, parts, resolved_yaml(recipe), lambda *told: None)
        saver.save({"step": 3, "tokens": 9, "samples": 3, "skipped": 0})
        assert saver.saved_step == 3
    finally:
        stop_processes()
    return directory


def logits_of(directory, tokens):
    with trained_model(load_resolved(directory / "recipe.yaml"), directory) as model:
        return forward_logits(model.parts.whole_model, tokens).float()


def greedy_text(directory, prompt, count):
    with trained_model(load_resolved(directory / "recipe.yaml"), directory) as model:
        options = {"temperature": 0, "seed": 0, "window": 64, "end": model.data.tokenizer.end}
        return list(continue_tokens(model.parts, prompt, count=count, **options))


def boxes(directory):
    regions = Regions(newest_valid(directory / "checkpoints")[0])
    model = load_resolved(directory / "recipe.yaml").model
    return {t.name: regions.read(t.key, t.start, t.extent) for t in published_tensors(model)}


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """Exports by dtype, of several small files."""
    place = tmp_path_factory.mktemp("exports")
    for dtype in ("fp32", "bf16", "fp8"):
        words = [f"run={run}", f"output={place / dtype}", f"dtype={dtype}", "shard=100KiB", "processes=1"]
        assert export_hf.main(words) == 0
        assert len(list((place / dtype).glob("model-*.safetensors"))) > 3
        assert not list((place / dtype).glob(".model*"))
    return place


TOKENS = torch.arange(40).view(2, 20) * 7 % 512


def test_an_export_has_the_logits_of_the_run_in_transformers(run, exported):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(exported / "fp32", dtype=torch.float32).eval()
    with torch.no_grad():
        expected = theirs(TOKENS).logits
    difference = (logits_of(run, TOKENS) - expected).abs().max().item()
    assert difference < 1e-4, f"{difference:.2e} of |logit| up to {expected.abs().max():.1f}"
    greedy = theirs.generate(TOKENS[:1], max_new_tokens=12, do_sample=False)[0, 20:].tolist()
    assert greedy == greedy_text(run, TOKENS[0].tolist(), 12)
    tokenizer = AutoTokenizer.from_pretrained(exported / "fp32")
    text = "def read(self, size=-1):\n    return 12345  # naïve ✓"
    with trained_model(load_resolved(run / "recipe.yaml"), run) as model:
        assert tokenizer(text)["input_ids"] == model.data.tokenizer.encode(text).tolist()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_every_dtype_holds_its_values_and_imports_back(run, exported, tmp_path):
    original = boxes(run)
    for dtype in ("fp32", "bf16", "fp8"):
        output = tmp_path / dtype
        assert import_hf.main([f"input={exported / dtype}", f"output={output}", "processes=1"]) == 0
        back = boxes(output)
        assert back.keys() == original.keys()
        for name, values in original.items():
            if name.endswith("e_score_correction_bias"):
                assert back[name].dtype == torch.float32 and torch.equal(back[name], values)
            elif dtype == "fp32":
                assert torch.equal(back[name], values), name
            elif dtype == "bf16" or "norm" in name or "gate.weight" in name or "eh_proj" in name:
                assert torch.equal(back[name], values.bfloat16()), name
            else:
                assert (back[name].float() - values).abs().max() <= values.abs().max() * 2**-4, name
        precision = load_resolved(output / "recipe.yaml").precision.name
        assert precision == ("fp32" if dtype == "fp32" else "bf16")
    assert torch.equal(logits_of(tmp_path / "fp32", TOKENS), logits_of(run, TOKENS))


def test_fp8_files_read_by_transformers_quantiser_have_the_weights_of_their_import(exported, tmp_path):
    """transformers' own FP8 reader, dequantising to BF16: code that nobody here wrote reads our blocks and scales.

    Weights are compared, not logits: a rounding of BF16 sends tokens of random weights to other experts."""
    pytest.importorskip("accelerate", reason="pip install accelerate")
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    config = FineGrainedFP8Config(weight_block_size=(128, 128), dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(exported / "fp8", quantization_config=config).float()
    import_hf.main([f"input={exported / 'fp8'}", f"output={tmp_path / 'run'}", "dtype=fp32", "processes=1"])
    recipe = load_resolved(tmp_path / "run" / "recipe.yaml")
    expected = from_hugging_face(theirs.state_dict(), recipe.model)
    with trained_model(recipe, tmp_path / "run") as model:
        ours = model.parts.whole_model.state_dict()
        for name, values in expected.items():
            if any(size > 128 and size % 128 for size in values.shape[-2:]):
                continue  # transformers 5.23 cuts partial blocks, such as the published 576 rows, into even ones
            error = (ours[name].float() - values).abs().max() / values.abs().max()
            assert error < 2**-7, f"{name}: {error:.4f}"


def test_the_mtp_module_is_the_layer_after_the_last_with_the_embedding_half_first(run, exported):
    model = load_resolved(run / "recipe.yaml").model
    index = json.loads((exported / "fp32" / INDEX).read_text())["weight_map"]
    with trained_model(load_resolved(run / "recipe.yaml"), run) as trained:
        ours = dict(trained.parts.whole_model.named_parameters())
        for depth, name in product(range(2), ("eh_proj", "enorm", "hnorm", "shared_head.norm")):
            published = f"model.layers.{model.num_hidden_layers + depth}.{name}.weight"
            with safe_open(exported / "fp32" / index[published], "pt") as file:
                mine = ours[f"mtp.layers.{depth}.{name.replace('shared_head.norm', 'final_layernorm')}.weight"]
                assert torch.equal(file.get_tensor(published), mine)


def test_an_interrupted_export_goes_on_and_a_damaged_file_is_made_anew(run, tmp_path, monkeypatch):
    words = [f"run={run}", f"output={tmp_path}", "dtype=bf16", "shard=100KiB", "processes=1"]
    written, original = [], torch.equal

    def dies(*tensors):
        written.append(1)
        if len(written) == 150:
            raise KeyboardInterrupt
        return original(*tensors)

    monkeypatch.setattr(torch, "equal", dies)
    with pytest.raises(KeyboardInterrupt):
        export_hf.main(words)
    monkeypatch.undo()
    assert not (tmp_path / INDEX).exists()
    finished = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(finished) >= 2
    before = {path: path.stat().st_mtime_ns for path in finished}
    damaged = bytearray(finished[0].read_bytes())
    damaged[-1] ^= 1
    finished[0].write_bytes(damaged)
    assert export_hf.main(words) == 0
    assert finished[0].stat().st_mtime_ns != before[finished[0]] and finished[0].read_bytes() != bytes(damaged)
    assert all(path.stat().st_mtime_ns == before[path] for path in finished[1:])


def test_workers_in_processes_write_the_same_files(run, exported, tmp_path):
    export_hf.main([f"run={run}", f"output={tmp_path / 'two'}", "dtype=fp8", "shard=100KiB", "processes=2"])
    for file in set((exported / "fp8").iterdir()) - {exported / "fp8" / export_hf.MARK}:
        assert (tmp_path / "two" / file.name).read_bytes() == file.read_bytes(), file.name
    import_hf.main([f"input={tmp_path / 'two'}", f"output={tmp_path / 'run'}", "processes=2"])
    assert newest_valid(tmp_path / "run" / "checkpoints")[0].name == "step_00000000"


def test_what_is_wrong_with_an_input_is_named(exported, tmp_path):
    def refused(change, match):
        place = shutil.copytree(exported / "fp32", tmp_path / match.split()[0].replace("/", "_"))
        change(place)
        with pytest.raises(CheckpointError, match=match) as error:
            import_hf.main([f"input={place}", f"output={place}.run", "processes=1"])
        assert "\n" not in str(error.value)
        assert newest_valid(Path(f"{place}.run") / "checkpoints") == (None, [])

    def rewrite(place, edit):
        file = place / sorted(p.name for p in place.glob("model-*.safetensors"))[1]
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file)

    def truncate(place):
        file = sorted(place.glob("model-*.safetensors"))[1]
        file.write_bytes(file.read_bytes()[:-100])

    def forget(place):
        index = json.loads((place / INDEX).read_text())
        del index["weight_map"]["model.layers.1.mlp.experts.3.up_proj.weight"]
        (place / INDEX).write_text(json.dumps(index))

    def other_head(place):
        index = json.loads((place / INDEX).read_text())["weight_map"]
        file = place / index["model.layers.4.shared_head.head.weight"]
        tensors = load_file(file)
        tensors["model.layers.4.shared_head.head.weight"] += 1
        save_file(tensors, file)

    refused(lambda p: rewrite(p, lambda t: t.update({n: v[:-1].contiguous() for n, v in t.items()})), "has shape")
    refused(truncate, "cannot be read")
    refused(forget, "mlp.experts.3.up_proj.weight, which")
    refused(lambda p: sorted(p.glob("model-*"))[1].unlink(), "safetensors is missing")
    refused(other_head, "shared_head.head.weight differs from lm_head.weight")
    refused(lambda p: [(p / INDEX).unlink()], "holds neither")


def test_fp8_scales_stand_for_the_values(exported):
    name = "model.layers.1.mlp.shared_experts.gate_proj.weight"
    folders = {dtype: json.loads((exported / dtype / INDEX).read_text())["weight_map"] for dtype in ("fp8", "fp32")}

    def read(dtype, tensor):
        with safe_open(exported / dtype / folders[dtype][tensor], "pt") as file:
            return file.get_tensor(tensor)

    data, scales = read("fp8", name), read("fp8", f"{name}_scale_inv")
    assert data.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32
    expected = read("fp32", name)
    torch.testing.assert_close(dequantise_weight(data, scales, torch.float32), expected, rtol=2**-4, atol=1e-3)


def test_a_command_says_which_checkpoint_takes_the_place_of_a_damaged_one(run, tmp_path, capsys):
    place = shutil.copytree(run, tmp_path / "run") / "checkpoints"
    newer = shutil.copytree(place / "step_00000003", place / "step_00000009")
    (newer / "metadata.json").write_text("torn")
    line = f"warning: {newer}/metadata.json has 4 bytes, its manifest says 119; {place}/step_00000003 is used instead"
    with trained_model(load_resolved(run / "recipe.yaml"), tmp_path / "run", with_data=False) as model:
        assert model.notes == (line,) and model.progress["step"] == 3
    assert export_hf.main([f"run={tmp_path / 'run'}", f"output={tmp_path / 'out'}", "processes=1"]) == 0
    assert capsys.readouterr().err.splitlines()[0] == line


TASK = """
task: local_text
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
output_type: loglikelihood_rolling
validation_split: validation
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""


def test_lm_eval_on_an_export_finds_the_bits_per_byte_of_the_run(run, exported, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="pip install -e '.[lm-eval]'")
    for variable in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(variable, "1")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    texts = ["def read(self):", "import os, sys", "for x in range(10): print(x)"]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (tmp_path / "local_text.yaml").write_text(TASK.format(file=tmp_path / "texts.jsonl"))
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    arguments = f"pretrained={exported / 'fp32'},dtype=float32"
    found = simple_evaluate("hf", arguments, tasks=["local_text"], task_manager=tasks, device="cpu", batch_size=1)
    bits = 0.0
    with trained_model(load_resolved(run / "recipe.yaml"), run) as model:
        tokenizer = model.data.tokenizer
        for text in texts:
            ids = torch.tensor([[tokenizer.begin, *tokenizer.encode(text)]])
            chances = forward_logits(model.parts.whole_model, ids[:, :-1]).float().log_softmax(-1)
            bits -= chances.gather(-1, ids[:, 1:, None]).sum().item() / math.log(2)
    expected = bits / sum(len(text.encode()) for text in texts)
    assert found["results"]["local_text"]["bits_per_byte,none"] == pytest.approx(expected, rel=1e-3)
