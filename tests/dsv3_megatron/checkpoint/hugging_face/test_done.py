"""A file is taken for finished only by a mark that vouches for it; any other mark lets it be made anew."""

import json

import pytest

from dsv3_megatron.checkpoint.hugging_face.done import facts_if_done, mark_done
from dsv3_megatron.checkpoint.manifest import checksum


def test_a_marked_file_is_done_until_it_or_its_source_changes(tmp_path):
    file = tmp_path / "shard"
    file.write_bytes(b"weights")
    facts = mark_done(file, [1, "bf16"], {"xxh3": checksum(file)})
    assert facts_if_done(file, [1, "bf16"]) == facts
    assert facts_if_done(file, [2, "bf16"]) is None
    file.write_bytes(b"weighed")
    assert facts_if_done(file, [1, "bf16"]) is None


@pytest.mark.parametrize("more", [{}, {"xxh3": "of the file itself"}, {"facts": None}, {"facts": {}}])
def test_a_mark_of_another_form_lets_the_file_be_made_anew(tmp_path, more):
    """As an earlier version left it: the facts beside the source."""
    file = tmp_path / "shard"
    file.write_bytes(b"weights")
    (tmp_path / ".shard.done").write_text(json.dumps({"source": [1], **more}))
    assert facts_if_done(file, [1]) is None
