"""Files in YAML: a recipe of somebody else, one that a run has stored, a dashboard."""

import os

import pytest

from launcher.command_line.compose import compose, load_resolved, resolved_yaml
from launcher.dashboard import SHIPPED, load
from testing.fuzz.mutate import yaml_text

SECRET = "a-value-that-nobody-may-see"
CLUSTER = b"""name: ours
nodes: 2
gpus_per_node: 4
memory: 80GiB
time_limit: "4:00:00"
peak_tflops: {bf16: 989, fp8: 1979}
slurm:
  setup: ["module load cuda"]
  environment: {NCCL_SOCKET_IFNAME: bond0}
"""


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv("SECRET", SECRET)


def test_a_recipe_file(fuzz, tmp_path, monkeypatch):
    file = tmp_path / "recipes" / "cluster" / "ours.yaml"
    file.parent.mkdir(parents=True)
    monkeypatch.chdir(tmp_path)

    def read(data):
        file.write_bytes(data)
        assert SECRET not in resolved_yaml(compose(["recipe=dsv3_tiny", "cluster=ours"]))

    fuzz(yaml_text, [CLUSTER, CLUSTER.replace(b"ours", b"${oc.env:HOME}")], read)


def test_a_stored_recipe(fuzz, tmp_path):
    stored = tmp_path / "recipe.yaml"

    def read(data):
        stored.write_bytes(data)
        recipe = load_resolved(stored)
        text = resolved_yaml(recipe)
        assert SECRET not in text
        stored.write_text(text)
        assert load_resolved(stored) == recipe

    fuzz(yaml_text, [resolved_yaml(compose([f"recipe={name}"])).encode() for name in ("dsv3_tiny", "dsv3_671b")], read)


def test_a_dashboard(fuzz, tmp_path):
    file = tmp_path / "d.yaml"

    def read(data):
        file.write_bytes(data)
        load(file)

    fuzz(yaml_text, [SHIPPED.read_bytes()], read)
    os.unlink(file)
