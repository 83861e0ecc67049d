"""What the command writes, and what it leaves alone."""

import json

import pytest

from launcher import train_tokenizer
from parallel.errors import DataError


@pytest.fixture
def words(tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": "def f(x): return 12345 " * 20}))
    return [f"input={tmp_path / 'in.jsonl'}", f"output={tmp_path / 'tokenizer.json'}", "vocab_size=280"]


def test_it_replaces_what_it_has_written_itself(words, tmp_path):
    for _ in range(2):
        assert train_tokenizer.main(words) == 0
    (tmp_path / "tokenizer.json").write_text("that of a model")
    with pytest.raises(DataError, match=r"tokenizer.json is there, and this command has not written it"):
        train_tokenizer.main(words)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("kind", ["file", "link"])
def test_a_file_of_another_tokenizer_is_not_touched(words, tmp_path, name, kind):
    (tmp_path / "other").write_text("precious")
    if kind == "link":
        (tmp_path / name).symlink_to(tmp_path / "other")
    else:
        (tmp_path / name).write_text("precious")
    with pytest.raises(DataError, match=f"{name} is there, and this command has not written it") as error:
        train_tokenizer.main(words)
    assert "\n" not in str(error.value) and (tmp_path / name).read_text() == "precious"
