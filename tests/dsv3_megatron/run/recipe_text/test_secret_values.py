"""What a recipe may spell out: settings of a cluster, and no password, key or token."""

import pytest

from dsv3_megatron.run.recipe_text.secret_values import check_secrets, is_secret


@pytest.mark.parametrize(
    "name",
    ["WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "DB_PASSWORD", "token", "My_ApiKey",
     "GITHUB_PASS"],
)  # fmt: skip
def test_names_of_secrets_are_known(name):
    assert is_secret(name)


@pytest.mark.parametrize(
    "name",
    ["NCCL_IB_PKEY", "NCCL_SOCKET_IFNAME", "TOKENIZERS_PARALLELISM", "SSH_AUTH_SOCK", "MAX_TOKENS", "UCX_TLS", "BYPASS",
     "KEYBOARD"],
)  # fmt: skip
def test_names_of_settings_are_taken(name):
    assert not is_secret(name)
    check_secrets({"cluster": {"slurm": {"environment": {name: "x"}}}})


@pytest.mark.parametrize(
    "slurm",
    [
        {"setup": ["export HF_TOKEN=$(cat ~/.token)", "export HF_TOKEN", 'export HF_TOKEN="$MINE"', "echo PASS=; x"]},
        {"image": "docker://registry.example.com:5000/image@sha256:abc", "options": ["--export=ALL"]},
    ],
)
def test_what_the_shell_looks_up_and_addresses_without_a_password_are_taken(slurm):
    check_secrets({"cluster": {"slurm": slurm}})


@pytest.mark.parametrize(
    "recipe",
    [
        {"cluster": {"slurm": {"setup": ["A=1 HF_TOKEN='hidden'"]}}},
        {"cluster": {"slurm": {"options": ["--export=ALL,HF_TOKEN=hidden"]}}},
        {"cluster": {"slurm": {"environment": {"https_proxy": "http://me:hidden@proxy:3128"}}}},
        {"data": {"path": "s3://:hidden@bucket/x"}},
        {"evaluate": {"tasks": ["https://a/b", "https://me:hidden@host/b"]}},
    ],
)
def test_a_secret_is_refused_by_its_place_and_not_repeated(recipe):
    with pytest.raises(ValueError, match="would be written to recipe.yaml, report and W&B") as caught:
        check_secrets(recipe)
    assert "hidden" not in str(caught.value) and "\n" not in str(caught.value)
