"""What NVIDIA's tools say, read from what they print; on nodes without them that is said."""

import json
import os
import stat

import pytest

from dsv3_megatron.nodes.health import QUERY, dcgm_problems, gpu_problems, smi_problems

FINE = ["0", "No", "No", "Not Active", "Not Active"]


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Return a function that puts a tool with a text to print, and its exit code, alone on the path."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def tool(name, text, code=0):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\nwhile read -r line; do echo \"$line\"; done <<'END'\n{text}\nEND\nexit {code}\n")
        path.chmod(path.stat().st_mode | stat.S_IEXEC)

    assert os.path.isabs(str(tmp_path))
    return tool


def rows(*changed):
    """Return what nvidia-smi prints of eight GPUs; ``changed``: (GPU, column, word)."""
    table = [[str(gpu), *FINE] for gpu in range(8)]
    for gpu, column, word in changed:
        table[gpu][1 + list(QUERY).index(column)] = word
    return table


def text_of(table):
    return "\n".join(", ".join(row) for row in table)


def test_sound_gpus_have_no_problem():
    assert list(smi_problems(rows())) == []
    assert list(smi_problems([["0", *["[N/A]"] * len(QUERY)]])) == []  # cards that count no errors


@pytest.mark.parametrize(
    ("column", "word", "said"),
    [
        (
            "ecc.errors.uncorrected.volatile.total",
            "3",
            "GPU 5: uncorrected memory errors since the driver was loaded (3)",
        ),
        ("remapped_rows.pending", "Yes", "GPU 5: rows of memory to be remapped at its next reset"),
        ("remapped_rows.failure", "Yes", "GPU 5: a row of memory that could not be remapped"),
        ("clocks_event_reasons.hw_thermal_slowdown", "Active", "GPU 5: slowed down by its temperature"),
    ],
)
def test_what_nvidia_smi_says_names_the_gpu(column, word, said):
    assert list(smi_problems(rows((5, column, word)))) == [said]


def test_a_gpu_that_has_fallen_off_the_bus_is_missed(tools):
    tools("nvidia-smi", text_of(rows()[:7]))
    assert gpu_problems(8)[0] == ["has 7 GPUs, and should have 8"]
    assert gpu_problems(7)[0] == []


def test_what_is_not_looked_at_is_said(tools):
    assert gpu_problems(8) == (
        [],
        ["nvidia-smi is not there: health of GPUs not looked at", "dcgmi is not there: no diagnosis"],
    )
    tools("nvidia-smi", 'Field "remapped_rows.pending" is not a valid field to query.')
    tools("dcgmi", "Error: unable to connect")
    problems, remarks = gpu_problems(8)
    assert problems == [] and len(remarks) == 2 and "is not a valid field" in remarks[0]


def test_a_driver_that_does_not_answer_is_a_problem(tools):
    tools("nvidia-smi", "Failed to initialize NVML: Driver/library version mismatch", code=18)
    assert gpu_problems(8)[0] == ["nvidia-smi does not answer"]


# As versions 3 and 4 of DCGM nest their results.
VERSION_3 = {"DCGM GPU Diagnostic": {"test_categories": [{"category": "Deployment", "tests": [
    {"name": "Denylist", "results": [{"gpu_ids": "0,1", "status": "Pass"}]},
    {"name": "Page Retirement", "results": [{"gpu_ids": "2", "status": "Fail", "warnings": "x"}]}]}]}}  # fmt: skip
VERSION_4 = {"DCGM Diagnostic": {"test_categories": [{"category": "Deployment", "tests": [
    {"name": "software", "results": [{"entity_group": "GPU", "entity_id": 2, "status": "Fail"},
                                     {"entity_group": "GPU", "entity_id": 3, "status": "Pass"}],
     "test_summary": {"status": "Fail"}}]}]}}  # fmt: skip


def test_a_failed_diagnosis_names_test_and_gpu(tools):
    assert list(dcgm_problems(VERSION_3)) == ["dcgmi: Page Retirement has failed (GPU 2)"]
    assert list(dcgm_problems(VERSION_4)) == ["dcgmi: software has failed (GPU 2)", "dcgmi: software has failed"]
    tools("dcgmi", json.dumps(VERSION_3), code=226)
    assert gpu_problems(8)[0] == ["dcgmi: Page Retirement has failed (GPU 2)"]
