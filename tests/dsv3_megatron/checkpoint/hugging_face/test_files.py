"""What files may hold: each folder is read right, or refused in one line that names file, tensor and remedy."""

import json
import os
import re
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dsv3_megatron.checkpoint.hugging_face.headers import INDEX
from dsv3_megatron.checkpoint.hugging_face.import_ import import_weights
from dsv3_megatron.checkpoint.hugging_face.published_scales import check_scales
from dsv3_megatron.checkpoint.hugging_face.sources import find_sources
from dsv3_megatron.checkpoint.manifest import newest_valid
from launcher import import_hf
from parallel.errors import CheckpointError
from testing.published import E4M3, fp8, imported, published

EXPERT = "model.layers.1.mlp.experts.2.up_proj.weight"
MATRIX = "model.layers.0.self_attn.o_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def read(made, tmp_path, dtype=None, **options):
    """Return (what an import holds, what was found of it, what there is to tell)."""
    sources = find_sources(made.model, made.write(tmp_path / "published", **options), made.config)
    told = [*sources.told, check_scales(sources) or ""]
    import_weights(sources, tmp_path / "run/checkpoints", recipe="", dtype=dtype, processes=1)
    return imported(tmp_path / "run", sources.model), sources, "\n".join(told)


def refused(folder, *words):
    """Return the one line an import is refused with; nothing that looks like a checkpoint is left."""
    run = folder.with_name("run")
    named = ["recipe=dsv3_tiny"]  # or every shipped recipe would be composed, a second in all, to look for the shape
    with pytest.raises(CheckpointError) as error:
        import_hf.main([f"input={folder}", f"output={run}", "processes=1", *named, *words])
    assert "\n" not in error.value.args[0]
    assert newest_valid(run / "checkpoints") == (None, []) and not (run / "recipe.yaml").exists()
    return str(error.value)


# -- names -------------------------------------------------------------------------------------------------------------


def stacked(made, **more):
    """Hold experts as transformers 5 does: all of a layer in two tensors."""
    for name in [name for name in made.tensors if name.endswith("experts.0.gate_proj.weight")]:
        place = name.removesuffix(".0.gate_proj.weight")
        one = [
            [made.tensors.pop(f"{place}.{e}.{part}_proj.weight") for e in range(4)] for part in ("gate", "up", "down")
        ]
        gate, up, down = (torch.stack([values.float() for values in part]) for part in one)
        made.tensors[f"{place}.gate_up_proj"] = torch.cat([gate, up], dim=1).bfloat16()
        made.tensors[f"{place}.down_proj"] = down.bfloat16()


def inside_a_larger_model(made):
    made.rename(lambda name: f"language_model.{name}")
    made.tensors["vision_tower.encoder.weight"] = torch.ones(3, dtype=torch.int64)
    made.tensors["mm_projector.proj.0.weight"] = torch.ones(3)


def as_transformers_names_it(made):
    made.rename(lambda name: name if name.startswith("lm_head") else name.replace("model.", "model.language_model.", 1))
    made.tensors["model.vision_tower.encoder.weight"] = torch.ones(3)


NAMES = {
    "as published": lambda made: None,
    "stacked experts": stacked,
    "inside a larger model": inside_a_larger_model,
    "inside a larger model, by transformers": as_transformers_names_it,
    "without model.": lambda made: made.rename(lambda name: name.removeprefix("model.")),
    "no copies in the MTP layer": lambda made: made.drop("2.embed_tokens.weight", "shared_head.head.weight"),
    "rotary frequencies": lambda made: made.tensors.update(
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    ),
}


@pytest.mark.parametrize("change", NAMES.values(), ids=NAMES)
def test_other_names_of_the_same_tensors_are_read(change, tmp_path):
    made, expected = published(), published().tensors
    change(made)
    found, _, _ = read(made, tmp_path)
    for name, values in found.items():
        assert torch.equal(values, expected[name]), name


def test_what_is_left_out_is_told(tmp_path, capsys):
    made = published()
    inside_a_larger_model(made)
    folder = made.write(tmp_path / "published")
    assert import_hf.main([f"input={folder}", f"output={tmp_path / 'run'}", "processes=1"]) == 0
    told = capsys.readouterr().out
    assert "1 tensors of vision_tower are left out" in told and "1 tensors of mm_projector are left out" in told


def test_an_mtp_module_of_another_kind_is_left_out_and_told(tmp_path):
    made = published()
    dense = {name: values for name, values in made.tensors.items() if not name.startswith("model.layers.2.mlp.")}
    for part in ("gate", "up", "down"):
        shape = (24, 40) if part == "down" else (40, 24)
        dense[f"model.layers.2.mlp.{part}_proj.weight"] = torch.ones(shape, dtype=torch.bfloat16)
    found, sources, told = read(replace(made, tensors=dense), tmp_path)
    assert sources.model.num_nextn_predict_layers == 0 and torch.equal(found[MATRIX], made.tensors[MATRIX])
    assert "the MTP module in layer 2 is dense" in told


# -- dtypes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [None, "fp32", "bf16"])
def test_plain_dtypes_are_read(stored, dtype, tmp_path):
    made = published(dtype=stored)
    found, sources, _ = read(made, tmp_path, dtype, shards=1)
    kept = {"fp32": torch.float32, "bf16": torch.bfloat16, None: stored}[dtype]
    for name, values in found.items():
        expected = torch.float32 if name.endswith("correction_bias") else kept
        assert values.dtype == expected and torch.equal(values, made.tensors[name].to(expected)), name
    assert sources.is_float32 == (stored == torch.float32)


FP8 = {
    "published": {},
    "blocks of 8": {"block": (8, 8)},
    "oblong blocks": {"block": (16, 5)},
    "rows in pieces": {"block": (1, 7)},
    "a scale a row": {"kind": "row"},
    "a scale a matrix": {"kind": "matrix"},
    "weight_scale": {"name": "weight_scale", "block": (8, 16)},
    "BF16 scales": {"scale_dtype": torch.bfloat16},
    "exponents": {"scale_dtype": torch.float8_e8m0fnu, "block": (8, 8)},
    "exponents as bytes": {"scale_dtype": torch.uint8},
    "any scales": {"power_of_two": False, "block": (8, 8)},
}


@pytest.mark.parametrize("options", FP8.values(), ids=FP8)
def test_fp8_is_multiplied_by_its_scales(options, tmp_path):
    made = published()
    expected = fp8(made, **options)
    if options.get("scale_dtype") is torch.uint8:
        made.config["quantization_config"]["scale_fmt"] = "ue8m0"
    found, _, _ = read(made, tmp_path, "fp32")
    for name, values in found.items():
        assert torch.equal(values, expected[name].float()), name


@pytest.mark.parametrize("width", [64, 8])  # of the files' blocks, in ours of 16: also across gate and up
def test_stacks_of_experts_in_fp8_are_read(width, tmp_path):
    made = published()
    stacked(made)
    expected = {}
    for name in [name for name in made.tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, rows, columns = made.tensors[name].shape
        data = (torch.randn(experts, rows, columns) * 50).to(E4M3)
        scales = torch.rand(experts, -(-rows // width), -(-columns // width)) + 0.5
        each = scales.repeat_interleave(width, 1).repeat_interleave(width, 2)[:, :rows, :columns]
        expected[name] = data.float() * each
        made.tensors |= {name: data, f"{name}_scale_inv": scales}
    made.config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [width, width]}
    found, _, _ = read(made, tmp_path, "fp32")
    for layer in (1, 2):
        place = f"model.layers.{layer}.mlp.experts"
        for expert in range(4):
            parts = [found[f"{place}.{expert}.{part}_proj.weight"] for part in ("gate", "up", "down")]
            assert torch.equal(torch.cat(parts[:2]), expected[f"{place}.gate_up_proj"][expert])
            assert torch.equal(parts[2], expected[f"{place}.down_proj"][expert])


def test_scales_that_are_no_powers_of_two_are_told(tmp_path):
    made = published()
    fp8(made, power_of_two=False)
    made.config["quantization_config"]["scale_fmt"] = "ue8m0"
    assert "scale_fmt = ue8m0, but" in read(made, tmp_path)[2]


# -- refused -----------------------------------------------------------------------------------------------------------


def put(name, change):
    """Return a change of one tensor."""
    return lambda made: made.tensors.update({name: change(made.tensors[name])})


def add(name, values):
    return lambda made: made.tensors.update({name: values})


def spoil(values, number):
    values = values.clone()
    values.view(-1)[5] = number
    return values


def in_fp8(change=lambda made: None, **options):
    """Return a change of a folder in FP8."""

    def both(made):
        fp8(made, **options)
        change(made)

    return both


def quantization(**said):
    return lambda made: made.config.update(quantization_config={"quant_method": "fp8", **said})


SCALE = f"{MATRIX}_scale_inv"
REFUSED = {
    "NaN": (put(MATRIX, lambda t: spoil(t, float("nan"))), r"o_proj.weight holds NaN or Inf \(1 of them, .* \[0, 5\]"),
    "Inf": (put(EXPERT, lambda t: spoil(t, float("inf"))), f"{EXPERT} holds NaN or Inf"),
    "NaN in the router's bias": (put(BIAS, lambda t: t * float("nan")), f"{BIAS} holds NaN or Inf"),
    "E5M2": (put(MATRIX, lambda t: t.to(torch.float8_e5m2)), f"{MATRIX} is F8_E5M2, FP8 in E5M2"),
    "INT8": (put(MATRIX, lambda t: t.to(torch.int8)), f"{MATRIX} is I8, INT8"),
    "U8": (put(MATRIX, lambda t: t.to(torch.uint8)), "is U8, packed 4 bits"),
    "int64": (put(NORM, lambda t: t.long()), f"{NORM} is I64"),
    "bool": (put(NORM, lambda t: t.bool()), f"{NORM} is BOOL"),
    "FP64": (put(NORM, lambda t: t.double()), f"{NORM} is F64"),
    "compressed-tensors": (
        lambda made: made.rename(lambda name: name.replace("o_proj.weight", "o_proj.weight_packed")),
        "o_proj.weight_packed looks like compressed-tensors",
    ),
    "AWQ": (add(MATRIX.replace("weight", "qzeros"), torch.ones(2, dtype=torch.int32)), "looks like AWQ"),
    "NVFP4": (add(MATRIX.replace("weight", "weight_scale_2"), torch.ones(())), "looks like NVFP4"),
    "MXFP4": (add("model.layers.1.mlp.experts.down_proj_blocks", torch.ones(2).byte()), "looks like MXFP4"),
    "another method": (quantization(quant_method="awq"), "quantization_config.quant_method = 'awq'"),
    "another method of the text model": (
        lambda made: made.config.update(text_config={"quantization_config": {"quant_method": "compressed-tensors"}}),
        "quant_method = 'compressed-tensors'",
    ),
    "E5M2 by configuration": (quantization(fmt="e5m2"), "quantization_config.fmt = 'e5m2'"),
    "a form of scales": (quantization(scale_fmt="e5m3"), "quantization_config.scale_fmt = 'e5m3'"),
    "no block size": (quantization(weight_block_size=[128, 0]), r"weight_block_size = \[128, 0\]"),
    "no block": (quantization(weight_block_size="128"), "weight_block_size = '128'"),
    "FP8 without a scale": (in_fp8(lambda made: made.tensors.pop(SCALE)), f"{MATRIX} is FP8, but there is no {SCALE}"),
    "a scale without FP8": (add(SCALE, torch.ones(1, 1)), f"{MATRIX} is BF16, yet there is {SCALE}"),
    "a scale of nothing": (add("model.layers.0.mlp.old.weight_scale", torch.ones(1)), "has no model.layers.0.mlp.old"),
    "two scales": (in_fp8(add(MATRIX + "_scale", torch.ones(1, 1))), "there is .*scale_inv and .*_scale;"),
    "a scale of another grid": (in_fp8(put(SCALE, lambda t: torch.ones(7, 3))), r"scales \[7, 3\] do not fit a weight"),
    "a scale a row beside blocks": (in_fp8(put(SCALE, lambda t: torch.ones(24, 1)), block=(8, 8)), "do not fit"),
    "a scale of NaN": (in_fp8(put(SCALE, lambda t: t * float("nan"))), f"{SCALE} holds a scale that is not above 0"),
    "a scale of 0": (in_fp8(put(SCALE, torch.zeros_like)), f"{SCALE} holds a scale that is not above 0"),
    "a scale below 0": (in_fp8(put(SCALE, torch.neg)), f"{SCALE} holds a scale that is not above 0"),
    "a NaN exponent": (
        in_fp8(put(SCALE, lambda t: torch.full((1, 1), 255).byte().view(torch.float8_e8m0fnu))),
        "is not above 0",
    ),
    "integer scales": (in_fp8(put(SCALE, lambda t: t.int())), f"{SCALE} is I32, which no scale is"),
    "a byte without scale_fmt": (in_fp8(put(SCALE, lambda t: t.byte())), f"{SCALE} is U8, which no scale is"),
    "NaN in FP8": (in_fp8(put(MATRIX, lambda t: spoil(t.view(torch.uint8), 127).view(E4M3))), f"{MATRIX} holds NaN"),
    "a vector in FP8": (put(NORM, lambda t: t.to(E4M3)), f"{NORM} is FP8 and no matrix"),
    "a shape": (put(MATRIX, lambda t: t.t()), f"{MATRIX} has shape"),
    "a tensor too few": (lambda made: made.tensors.pop(EXPERT), f"lacks {EXPERT}"),
    "a tensor too many": (add("model.layers.0.self_attn.o_proj.bias", torch.ones(24)), "holds .*o_proj.bias, which"),
    "a layer too many": (add("model.layers.3.input_layernorm.weight", torch.ones(24)), "holds model.layers.3"),
    "two names of one tensor": (add("norm.weight", torch.ones(24)), "model.norm.weight and norm.weight stand for one"),
    "stacks the other way": (
        lambda made: [stacked(made), put("model.layers.1.mlp.experts.down_proj", lambda t: t.transpose(1, 2))(made)],
        "experts.down_proj has shape",
    ),
    "another embedding in the MTP layer": (
        put("model.layers.2.embed_tokens.weight", lambda t: t + 1),
        "2.embed_tokens.weight differs from model.embed_tokens.weight",
    ),
    "a missing file": (lambda made: setattr(made, "index", lambda m: {"weight_map": {**m, NORM: "a.safetensors"}}),
                       "a.safetensors is missing"),
    "another file": (
        lambda made: setattr(made, "index", lambda m: {"weight_map": {**m, NORM: m["lm_head.weight"]}}),
        f"says that {NORM} is in .*, but it is in",
    ),
    "a place outside": (
        lambda made: setattr(made, "index", lambda m: {"weight_map": {**m, NORM: "../a.safetensors"}}),
        "no safetensors file of this folder",
    ),
    "an absolute place": (
        lambda made: setattr(made, "index", lambda m: {"weight_map": {**m, NORM: "/a.safetensors"}}),
        "no safetensors file of this folder",
    ),
    "a number for a file": (
        lambda made: setattr(made, "index", lambda m: {"weight_map": {**m, NORM: 1}}),
        "no safetensors file of this folder",
    ),
    "a name that no file holds": (
        lambda made: setattr(made, "index", lambda m: {"weight_map": {**m, "x": m[NORM]}}),
        "says that x is in .*, which lacks it",
    ),
    "a name that the index lacks": (
        lambda made: setattr(made, "index", lambda m: {"weight_map": {k: v for k, v in m.items() if k != NORM}}),
        f"holds {NORM}, which {INDEX} does not name",
    ),
    "an index without names": (lambda made: setattr(made, "index", lambda m: {"weight_map": {}}), "names no tensors"),
    "an index that is a list": (lambda made: setattr(made, "index", lambda m: [m]), f"{INDEX} cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line(case, tmp_path):
    change, line = case
    made = published()
    change(made)
    message = refused(made.write(tmp_path / "published"))
    assert re.search(line, message), message


def test_float32_that_bf16_cannot_hold_is_refused(tmp_path):
    made = published(dtype=torch.float32)
    put(MATRIX, lambda t: spoil(t, 3.4e38))(made)
    folder = made.write(tmp_path / "published")
    assert f"{MATRIX} holds numbers that bf16 cannot; use dtype=fp32" in refused(folder, "dtype=bf16")


def pointer(folder):
    (folder / "model-00002-of-00003.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    )


def doubled(folder):
    """Hold a tensor in a second file as well."""
    path = folder / "model-00001-of-00003.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file({**tensors, "lm_head.weight": torch.ones(40, 24)}, path)


def pickled(name):
    """Hold a pickle in place of the safetensors."""

    def change(folder):
        for path in folder.glob("model*"):
            path.unlink()
        (folder / name).write_bytes(b"PK")

    return change


def elsewhere(name):
    """Put a link to a file outside in a file's place."""

    def change(folder):
        outside = folder.parent / "outside"
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)

    return change


def pipe(name):
    def change(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def write_beginning(folder, data, size=None):
    with (folder / "model-00002-of-00003.safetensors").open("r+b") as file:
        file.write(data)
        if size:
            file.truncate(size)  # a file with a hole: no byte of it is stored


def write_header(folder, change):
    """Change what a file says of its tensors."""
    path = folder / "model-00002-of-00003.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.dumps(change(json.loads(data[8 : 8 + length]))).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])


FOLDERS = {
    "a pointer of Git LFS": (pointer, "00002-of-00003.safetensors is a pointer of Git LFS, not the weights; run"),
    "a file beside the index": (
        lambda folder: (folder / "consolidated.safetensors").touch(),
        f"consolidated.safetensors lies beside what {INDEX} names",
    ),
    "one tensor in two files": (doubled, "lm_head.weight is in model-00001-of-00003.safetensors and in"),
    "a torn file": (lambda folder: (folder / "model-00002-of-00003.safetensors").write_bytes(b"12"), "cannot be read"),
    "no file of the index": (lambda folder: [path.unlink() for path in folder.glob("model-*")], "is missing and 2"),
    "files without an index": (lambda folder: (folder / INDEX).unlink(), f"holds neither {INDEX} nor"),
    "an index that is no text": (lambda folder: (folder / INDEX).write_bytes(b"\xff"), f"{INDEX} cannot be read"),
    "a link out of the folder": (elsewhere("model-00002-of-00003.safetensors"), "is a link out of the folder"),
    "an index that is a link out": (elsewhere(INDEX), "is a link out of the folder"),
    "a pipe": (pipe("model-00002-of-00003.safetensors"), "00002-of-00003.safetensors is missing"),
    "an index that is a pipe": (pipe(INDEX), "not a regular file"),
    "a header larger than the file": (
        lambda folder: write_beginning(folder, bytes(5) + b"\1\0\0"), "its header would have 1,099,511,627,776",
    ),
    "a header larger than memory": (
        lambda folder: write_beginning(folder, bytes(4) + b"\x10\0\0\0", size=1 << 37), "its header would have 68,7",
    ),
    "tensors that overlap": (
        lambda folder: write_header(folder, lambda found: {**found, "x": next(iter(found.values()))}), "cannot be read",
    ),
    "numbers behind the end": (
        lambda folder: write_header(
            folder, lambda found: {**found, "x": {"dtype": "F32", "shape": [1 << 50], "data_offsets": [0, 1 << 52]}}
        ),
        "cannot be read",
    ),
    "an index of a million levels": (
        lambda folder: (folder / INDEX).write_text('{"weight_map":' * 1_000_000), f"{INDEX} cannot be read",
    ),
    "a weight_map of null": (lambda folder: (folder / INDEX).write_text('{"weight_map": null}'), "names no tensors"),
    "a weight_map that is a list": (
        lambda folder: (folder / INDEX).write_text('{"weight_map": ["a"]}'), "names no tensors",
    ),
    "an index of null": (lambda folder: (folder / INDEX).write_text("null"), "it holds no weight_map"),
    "a pickle": (pickled("pytorch_model.bin"), "pytorch_model.bin: pickled weights are not read; convert them"),
    "a pickle of another name": (pickled("consolidated.00.pth"), "consolidated.00.pth: pickled weights"),
    "GGUF": (pickled("model-q4.gguf"), "weights are read from safetensors alone"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS.values(), ids=FOLDERS)
def test_a_folder_that_is_not_whole_is_refused_in_one_line(case, tmp_path):
    change, line = case
    folder = published().write(tmp_path / "published")
    change(folder)
    assert line in refused(folder)


def test_a_configuration_alone_says_that_there_are_no_weights(tmp_path, capsys):
    (tmp_path / "published").mkdir()
    (tmp_path / "published/config.json").write_text(json.dumps(published().config))
    (tmp_path / "published/training_args.bin").touch()  # of a trainer: no weights
    assert import_hf.main([f"input={tmp_path / 'published'}", f"output={tmp_path / 'run'}"]) == 0
    assert f"no weights in {tmp_path / 'published'}: the recipe alone is written" in capsys.readouterr().out


def test_an_interrupted_import_reads_anew_what_its_configuration_has_changed(tmp_path):
    """Blocks of 8 and of 9 have as many scales here, and the files with the matrices were finished before."""
    made, other = published(), published()
    fp8(made, block=(8, 8))
    expected = fp8(other, block=(9, 9))
    put("lm_head.weight", lambda t: t * float("nan"))(made)
    made.files = other.files = {"lm_head.weight": "of_the_head.safetensors"}  # the last that is read
    folder, other_folder = made.write(tmp_path / "published"), other.write(tmp_path / "other")
    refused(folder, "dtype=fp32")
    assert list((tmp_path / "run/checkpoints/.step_00000000.import").glob(".*.done"))
    for name in ("config.json", "of_the_head.safetensors"):
        shutil.copyfile(other_folder / name, folder / name)
    assert import_hf.main([f"input={folder}", f"output={tmp_path / 'run'}", "processes=1", "dtype=fp32"]) == 0
    for name, values in imported(tmp_path / "run", made.model).items():
        assert torch.equal(values, expected[name].float()), name


def test_a_folder_of_the_hubs_cache_is_read_through_its_links(tmp_path):
    made = published()
    blobs = made.write(tmp_path / "models--a--b" / "blobs")
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(blobs.iterdir())):
        file.rename(blobs / f"{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    words = [f"input={snapshot}", f"output={tmp_path / 'run'}", "processes=1", "recipe=dsv3_tiny"]
    assert import_hf.main(words) == 0
    assert torch.equal(imported(tmp_path / "run", made.model)[MATRIX], made.tensors[MATRIX])
