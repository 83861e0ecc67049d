"""A checkpoint of a stranger runs no code, and says in one line what is wrong with it.

Its checksums all match: whoever changes a file can write them anew.
"""

import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch

from dsv3_megatron.checkpoint import manifest
from dsv3_megatron.checkpoint.hugging_face.regions import Regions
from dsv3_megatron.checkpoint.index import INDEX, Described, read_index
from dsv3_megatron.checkpoint.load import _updates_in_format_1
from dsv3_megatron.checkpoint.manifest import MANIFEST, RECIPE, DamageError
from testing.small_checkpoint import BOXES, FILE, WHOLE, both, checkpoint, seal


class Calls:
    """What a crafted pickle calls."""

    def __init__(self, function, *given):
        self.function, self.given = function, given

    def __reduce__(self):
        return self.function, self.given


def refused(folder, line):
    for read in (both, lambda folder: Regions(folder).read("a", (0, 0), (4, 6))):
        with pytest.raises(DamageError) as error:
            read(folder)
        assert line in str(error.value) and "\n" not in str(error.value) and str(folder) in str(error.value)


def test_what_was_written_is_read(tmp_path):
    assert torch.equal(both(checkpoint(tmp_path / "c")), WHOLE)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_an_index_that_would_run_code_is_refused_by_what_it_names(tmp_path, protocol):
    def crafted(index):
        index.planner_data = Calls(os.mkdir, str(tmp_path / "made"))
        return pickle.dumps(index, protocol)

    folder = checkpoint(tmp_path / "c", crafted)
    with pytest.raises(DamageError) as error:
        read_index(folder)
    assert str(folder / INDEX) in str(error.value)
    assert protocol == 0 or "it names posix.mkdir" in str(error.value)
    refused(folder, "cannot be read")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("function", [getattr, torch.load, torch.storage._load_from_bytes, torch.serialization.load])
def test_no_callable_is_looked_up_that_would_do_harm_by_itself(tmp_path, function):
    refused(checkpoint(tmp_path / "c", lambda index: [index, Calls(function, b"x", "y")]), "it names ")


def change(**changed):
    """Return a change of where the second piece lies."""

    def index(found):
        vars(list(found.storage_data.values())[1]).update(changed)
        return found

    return index


def in_tensor(**changed):
    def index(found):
        vars(found.state_dict_metadata["a"]).update(changed)
        return found

    return index


def without_a_place(found):
    found.storage_data.popitem()
    return found


LIES = {
    "a file outside": (change(relative_path="../x"), "the manifest knows no bytes"),
    "a file that the manifest lacks": (change(relative_path="/dev/zero"), "the manifest knows no bytes"),
    "a place behind the end": (change(offset=1 << 40), "the manifest knows no bytes"),
    "a place before the beginning": (change(offset=-5), "the manifest knows no bytes"),
    "a length of all memory": (change(length=1 << 50), "the manifest knows no bytes"),
    "a place of another type": (change(offset="0"), "has a str where a int belongs"),
    "a piece without a place": (without_a_place, "does not say where a lies"),
    "another object": (lambda found: {"a": 1}, "no metadata.Metadata"),
    "nothing": (lambda found: None, "no metadata.Metadata"),
    "no bytes": (lambda found: b"", "cannot be read"),
    "a larger tensor": (in_tensor(size=torch.Size((1 << 40, 6))), "a is not stored whole"),
    "chunks that are none": (in_tensor(chunks=[None, 1]), "where one belongs"),
    "tensors that are none": (lambda found: vars(found).update(state_dict_metadata=[1]) or found, "it is no index"),
}


@pytest.mark.parametrize("case", LIES.values(), ids=LIES)
def test_an_index_that_lies_is_refused(tmp_path, case):
    index, line = case
    refused(checkpoint(tmp_path / "c", index), line)


def test_an_index_larger_than_what_it_describes_is_not_read(tmp_path):
    folder = checkpoint(tmp_path / "c")
    with (folder / INDEX).open("r+b") as file:
        file.truncate(1 << 35)  # with a hole: nothing is stored
    content = json.loads((folder / MANIFEST).read_text())["content"]
    content["files"][INDEX]["bytes"] = 1 << 35
    seal(folder, content)
    refused(folder, "it has 34,359,738,368 bytes, of ")
    content["files"]["hole.distcp"] = {"bytes": 1 << 40, "xxh3": "0" * 32}
    seal(folder, content)
    refused(folder, "it has 34,359,738,368 bytes, of ")


def test_pieces_that_overlap_leave_a_gap_and_are_refused(tmp_path):
    moved = [BOXES[0], Described("a", (4, 6), (1, 0), (2, 6), torch.float32)]
    folder = checkpoint(tmp_path / "c", boxes=moved)
    with pytest.raises(DamageError, match="a is not stored whole"):
        both(folder)
    with pytest.raises(Exception, match="is not stored whole") as error:
        Regions(folder).read("a", (0, 0), (4, 6))
    assert "\n" not in str(error.value)


def saved(content, records=None, compression=zipfile.ZIP_STORED):
    """Return a file as torch.save writes it, of what a stranger has put there."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        archive.writestr("archive/data.pkl", content if isinstance(content, bytes) else pickle.dumps(content, 2))
        for name, data in {"data/0": bytes(48), **(records or {})}.items():
            archive.writestr(f"archive/{name}", data)
    return out.getvalue()


def described(offset=0, shape=(2, 6), strides=(6, 1), storage=torch.FloatStorage):
    """Return data.pkl of a tensor that is described so."""
    out = io.BytesIO()
    pickler = pickle.Pickler(out, 2)
    given = SimpleNamespace()
    pickler.persistent_id = lambda found: ("storage", storage, "0", "cpu", 12) if found is given else None
    pickler.dump(Calls(torch._utils._rebuild_tensor_v2, given, offset, shape, strides, False, OrderedDict()))
    return out.getvalue()


PIECES = {
    "code": (saved(Calls(os.mkdir, "made")), "it names posix.mkdir"),
    "no zip": (b"x" * 500, "no file that torch.save has written"),
    "another shape": (saved(described(shape=(6, 2), strides=(2, 1))), "(6, 2)"),
    "another dtype": (saved(described(storage=torch.IntStorage)), "torch.int32"),
    "numbers behind the end": (saved(described(offset=1)), "has 48 bytes of numbers"),
    "strides out of the file": (saved(described(strides=(1 << 40, 1))), "bytes of numbers"),
    "negative strides": (saved(described(strides=(-6, 1))), "does not describe a tensor"),
    "an offset that is none": (saved(described(offset="0")), "does not describe a tensor"),
    "more axes than strides": (saved(described(strides=(1,))), "does not describe a tensor"),
    "a dictionary": (saved({"a": 1}), "it holds no tensor"),
    "numbers that are compressed": (
        saved(described(), {"data/0": bytes(1 << 24)}, zipfile.ZIP_DEFLATED), "compressed, or torn",
    ),
    "another byte order": (saved(described(), {"byteorder": b"big"}), "another byte order"),
}  # fmt: skip


@pytest.mark.parametrize("case", PIECES.values(), ids=PIECES)
def test_a_piece_that_is_none_is_refused(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    data, line = case
    refused(checkpoint(tmp_path / "c", piece=data), line)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("crafted", [Calls(os.mkdir, "made"), {"optimizer": Calls(os.mkdir, "made")}])
def test_the_file_of_format_1_that_is_no_tensor_runs_no_code(tmp_path, monkeypatch, crafted):
    monkeypatch.chdir(tmp_path)
    torch.save(crafted, tmp_path / "common.pt")
    with pytest.raises(DamageError, match="it names posix.mkdir"):
        _updates_in_format_1(tmp_path / "common.pt")
    assert not (tmp_path / "made").exists()


def cyclic():
    found = []
    found.append(found)
    return found


@pytest.mark.parametrize(
    "content", [[], {"optimizer": {"step": "x"}}, {"optimizer": {"step": -1}}, {"optimizer": cyclic()}, {"x": 1}, None]
)
def test_a_count_of_updates_that_is_none_is_damage(tmp_path, content):
    torch.save(content, tmp_path / "common.pt")
    with pytest.raises(DamageError, match="common.pt cannot be read"):
        _updates_in_format_1(tmp_path / "common.pt")


def test_a_count_of_updates_is_read(tmp_path):
    torch.save({"optimizer": {0: [{"lr": 0.5, "step": 3}], 1: {"step": 4.0}}}, tmp_path / "common.pt")
    assert _updates_in_format_1(tmp_path / "common.pt") == 4


# -- the manifest ------------------------------------------------------------------------------------------------------


def rewrite(folder, change):
    """Change a manifest's content, and let its checksum match."""
    content = json.loads((folder / MANIFEST).read_text())["content"]
    seal(folder, change(content) or content)


def setting(place, value):
    """Return a change of one value of a manifest; ``place`` names the way to it."""

    def change(content):
        *outer, last = place.split("/")
        for name in outer:
            content = content[name]
        if value is ...:
            del content[last]
        else:
            content[last] = value

    return change


FACTS = {"bytes": 10, "xxh3": "0" * 32}
MANIFESTS = {
    "no files": (setting("files", {}), "names no .metadata"),
    "no tensors": (setting(f"files/{FILE}", ...), "names no file of tensors"),
    "no recipe": (setting(f"files/{RECIPE}", ...), f"names no {RECIPE}"),
    "files that are a list": (setting("files", [FILE]), "files: Input should be a valid dictionary"),
    "facts that are none": (setting(f"files/{FILE}", 7), f"files.{FILE}"),
    "a size of text": (setting(f"files/{FILE}/bytes", "10"), f"files.{FILE}.bytes: Input should be a valid integer"),
    "a size below 0": (setting(f"files/{FILE}/bytes", -1), f"files.{FILE}.bytes"),
    "a size of another file": (setting(f"files/{FILE}/bytes", 10**12), "its manifest says 1000000000000"),
    "a checksum that is none": (setting(f"files/{FILE}/xxh3", None), f"files.{FILE}.xxh3"),
    "a file that is not there": (setting("files/x", FACTS), "x is missing"),
    "a device": (lambda content: content["files"].update({"/dev/zero": FACTS}), "names '/dev/zero', which can be no"),
    "a name outside": (lambda content: content["files"].update({"../x": FACTS}), "names '../x', which can be no"),
    "the folder": (lambda content: content["files"].update({"..": FACTS}), "names '..', which can be no"),
    "a name with NUL": (lambda content: content["files"].update({"a\0b": FACTS}), "which can be no"),
    "no format": (setting("format", ...), "format: Field required"),
    "a format of text": (setting("format", "2"), "format: Input should be a valid integer"),
    "no progress": (setting("progress", None), "progress: Input should be a valid dictionary"),
    "a step of text": (setting("progress/step", "3"), "progress.step: Input should be a valid integer"),
    "a step that is true": (setting("progress/step", True), "progress.step: Input should be a valid integer"),
    "tokens below 0": (setting("progress/tokens", -3), "progress.tokens"),
    "more tokens than a number holds": (setting("progress/tokens", 10**30), "progress.tokens"),
    "progress of another kind": (setting("progress/more", 1), "progress.more: Extra inputs are not permitted"),
    "losses of text": (setting("progress/health", {"losses": ["x"]}), "progress.health.losses.0"),
    "extra states that are text": (setting("extra", "ema"), "extra: Input should be a valid list"),
    "an optimizer of text": (setting("optimizer", "no"), "optimizer: Input should be a valid boolean"),
    "updates of text": (setting("updates", "x"), "updates: Input should be a valid integer"),
    "a tokenizer without a digest": (setting("tokenizer", {"name": "x"}), "tokenizer.sha256: Field required"),
    "data that is a number": (setting("data", 3), "data: Input should be a valid dictionary"),
    "what was frozen as a number": (setting("freeze", [3]), "freeze.0: Input should be a valid string"),
    "a list": (lambda content: [content], "its content: Input should be a valid dictionary"),
    "null": (lambda content: "null", "its content: Input should be a valid dictionary"),
}


@pytest.mark.parametrize("case", MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_is_complete_and_typed(tmp_path, case):
    change, line = case
    folder = checkpoint(tmp_path / "c")
    rewrite(folder, change)
    with pytest.raises(DamageError) as error:
        manifest.read_manifest(folder)
    assert line in str(error.value) and str(folder) in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("text", ["", "[]", "null", '{"xxh3": 1}', "[" * 100_000, '{"a":' * 100_000, "\0", "\xff", "{"])
def test_a_torn_manifest_is_damage(tmp_path, text):
    folder = checkpoint(tmp_path / "c")
    (folder / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(DamageError, match="manifest.json cannot be read"):
        manifest.read_content(folder)


@pytest.mark.parametrize("name", [MANIFEST, INDEX, FILE, RECIPE])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link out"])
def test_a_file_that_is_no_regular_one_of_the_folder_is_refused_at_once(tmp_path, name, kind):
    folder = checkpoint(tmp_path / "c")
    file = folder / name
    content = file.read_bytes()
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "folder":
        file.mkdir()
    else:
        (tmp_path / "elsewhere").write_bytes(content)
        file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamageError) as error:
        manifest.read_manifest(folder)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_a_link_within_the_folder_is_followed(tmp_path):
    folder = checkpoint(tmp_path / "c")
    (folder / FILE).rename(folder / "there")
    (folder / FILE).symlink_to("there")
    assert manifest.read_manifest(folder)["step"] == 0 and torch.equal(both(folder), WHOLE)
