"""Folders of published weights of which one file was changed."""

import json
from math import prod

import pytest

from dsv3_megatron.checkpoint.hugging_face.config import told_by_config
from dsv3_megatron.checkpoint.hugging_face.headers import INDEX, read_trained_with
from dsv3_megatron.checkpoint.hugging_face.published_scales import check_scales
from dsv3_megatron.checkpoint.hugging_face.sources import find_sources
from dsv3_megatron.checkpoint.hugging_face.values import OpenFiles
from dsv3_megatron.model.settings import RopeScaling
from launcher.import_hf import precision_of, read_config, settings_from_config
from testing.fuzz.mutate import binary, json_text
from testing.published import fp8, published


@pytest.fixture
def folder(tmp_path):
    made = published()
    fp8(made, block=(8, 8))
    return made.write(tmp_path / "published", shards=2)


def found_in(folder):
    """Read a folder as an import does; every number is finite and of the shape that the model has."""
    _, config = read_config(folder)
    model = settings_from_config(config)
    told_by_config(config)
    read_trained_with(folder, "data")
    sources = find_sources(model, folder, config)
    precision_of(config, None, sources)
    check_scales(sources)
    with OpenFiles(folder) as files:
        for source in sources.found[:6]:
            values = files.values(source.stored, None)
            assert values.isfinite().all() and values.numel() == prod(source.target.extent)
    return sources


def changing(folder, name):
    def read(data):
        (folder / name).write_bytes(data)
        assert found_in(folder).found

    return read


def test_a_configuration(fuzz, folder):
    config = json.loads((folder / "config.json").read_text())
    yarn = config | {"rope_scaling": RopeScaling().model_dump()}
    inside = {"model_type": "kimi_k25", "text_config": config, "quantization_config": config["quantization_config"]}
    seeds = [json.dumps(each).encode() for each in (config, yarn, inside)]
    fuzz(json_text, seeds, changing(folder, "config.json"))


def test_an_index(fuzz, folder):
    content = json.loads((folder / INDEX).read_text())
    content["metadata"] = {"total_size": 9, "trained_with": {"data": {"sha256": "0", "name": "x", "order": 1}}}
    fuzz(json_text, [json.dumps(content).encode()], changing(folder, INDEX))


def test_a_file_of_tensors(fuzz, folder):
    name = sorted(path.name for path in folder.glob("*.safetensors"))[0]
    fuzz(binary, [(folder / name).read_bytes()], changing(folder, name))


def test_a_header(fuzz, folder):
    name = sorted(path.name for path in folder.glob("*.safetensors"))[0]
    data = (folder / name).read_bytes()
    length = int.from_bytes(data[:8], "little")

    def read(header):
        changing(folder, name)(len(header).to_bytes(8, "little") + header + data[8 + length :])

    fuzz(json_text, [data[8 : 8 + length]], read)
