"""The te backend as far as a machine without a GPU sees it: its specs build, with the parameters they should have."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_megatron.model.costs import count_parameters
from launcher.compose import compose

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("recipe", ["dsv3_tiny", "dsv3_h200"])
def test_the_specs_build_on_transformer_engine_modules(recipe):
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'tests' / 'te_stub'}{os.pathsep}{ROOT}"}
    script = Path(__file__).with_name("te_on_meta.py")
    done = subprocess.run(
        [sys.executable, str(script), recipe], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    model = compose([f"recipe={recipe}"]).model
    counted = count_parameters(model)
    assert (found["main"], found["mtp"]) == (counted.main, counted.mtp)
    moe = model.num_moe_layers + model.num_nextn_predict_layers
    assert found["calls"]["TEColumnParallelGroupedLinear"] == found["calls"]["TERowParallelGroupedLinear"] == moe
    assert found["expert_allreduce"] == [False]
    query_key = model.qk_nope_head_dim + model.qk_rope_head_dim
    assert found["attention"] == [query_key, model.v_head_dim]
