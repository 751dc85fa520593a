"""Checkpoints: what is written comes back, what training scripts wrote is found, and the rest is refused."""

import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from course_lib import checkpoints

ABOUT = {"loss": "triplet", "size": [256, 128], "architecture": {"width": 2, "tricks": None}, "method": "é"}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


# write ---------------------------------------------------------------------------------------------------------------


def test_what_is_written_comes_back(tmp_path):
    path = tmp_path / "not" / "there" / "model.safetensors"
    model = network().to(memory_format=torch.channels_last)
    checkpoints.write(path, model, ABOUT)
    assert os.listdir(path.parent) == [path.name]
    state, about = checkpoints.read(path)
    assert same(state, model.state_dict()) and about == ABOUT
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in state.values())
    checkpoints.write(path, network(1))
    state, about = checkpoints.read(str(path))
    assert same(state, network(1).state_dict()) and about == {}


def test_the_same_input_gives_the_same_bytes(tmp_path):
    """Several keys of metadata would come in another order each time."""
    words = [(name, str(number)) for number, name in enumerate("abcdefgh")]
    for number in range(10):
        checkpoints.write(tmp_path / str(number), network(), dict(words if number % 2 else words[::-1]))
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1


def test_a_write_that_fails_leaves_the_file_before(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    checkpoints.write(path, network())
    before, write = path.read_bytes(), Path.write_bytes

    def full(file, content):
        write(file, content[: len(content) // 2])
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(Path, "write_bytes", full)
        checkpoints.write(path, network(1))
    assert path.read_bytes() == before
    checkpoints.write(path, network(1))
    assert same(checkpoints.read(path)[0], network(1).state_dict()) and os.listdir(tmp_path) == [path.name]


# read ----------------------------------------------------------------------------------------------------------------


WRAPPED = {
    "plain": lambda weights: weights,
    "state_dict": lambda weights: {"state_dict": weights, "epoch": 3, "arch": "resnet50"},
    "model": lambda weights: {"model": weights, "optimizer": {"lr": 0.1}},
    "net": lambda weights: {"net": weights, "acc": 71.2},
    "model_state_dict": lambda weights: {"epoch": 3, "model": "resnet50", "model_state_dict": weights},
    "twice": lambda weights: {"model": {"state_dict": weights}, "scheduler": None},
    "twice, the other way round": lambda weights: {"state_dict": {"net": weights}},
}


@pytest.mark.parametrize("wrapping", WRAPPED)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_what_training_scripts_wrote_is_found(tmp_path, wrapping, prefix):
    weights = network().state_dict()
    named = {f"{prefix}{part}": tensor for part, tensor in weights.items()}
    for name in ("weights.pth", "weights.pt", "pytorch_model.bin", "weights"):
        torch.save(WRAPPED[wrapping](named), tmp_path / name)
        state, about = checkpoints.read(tmp_path / name)
        assert same(state, weights) and about == {}


def test_files_of_others_are_read(tmp_path):
    weights = {f"module.{part}": tensor for part, tensor in network().state_dict().items()}
    save_file(weights, tmp_path / "timm.safetensors", {"format": "pt"})
    assert checkpoints.read(tmp_path / "timm.safetensors")[1] == {}
    assert same(checkpoints.read(tmp_path / "timm.safetensors")[0], network().state_dict())
    torch.save(weights, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(checkpoints.read(tmp_path / "old.pth")[0], network().state_dict())


def test_a_prefix_of_some_names_is_a_part_of_them(tmp_path):
    weights = {"module.weight": torch.ones(2), "head.weight": torch.zeros(2)}
    torch.save(weights, tmp_path / "weights.pth")
    assert same(checkpoints.read(tmp_path / "weights.pth")[0], weights)


def test_nothing_there_and_a_folder_are_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"expected at .*nowhere.pth, got nothing; give the path of a .safetens"
    ):
        checkpoints.read(tmp_path / "nowhere.pth")
    for name in ("folder.pth", "folder.safetensors"):
        (tmp_path / name).mkdir()
        with pytest.raises(RuntimeError, match=rf"expected at .*{name}, got a folder or pipe; give the path"):
            checkpoints.read(tmp_path / name)


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def refused(path: Path) -> str:
    """The sentence by which a file is refused; torch's advice to run its code is no part of it, nor of its cause."""
    with pytest.raises(RuntimeError, match="cannot be read: expected a whole file of tensors by name, got") as error:
        checkpoints.read(path)
    sentence = str(error.value)
    assert str(path) in sentence and "save the state_dict of the network alone" in sentence
    assert len(sentence) < 600 + len(str(path)) and error.value.__cause__ is None and error.value.__suppress_context__
    for advice in ("weights_only=False", "set to `False`", "add_safe_globals", "arbitrary code"):
        assert advice not in sentence
    return sentence


@pytest.mark.parametrize("content", [{"weight": Evil()}, Evil(), {"state_dict": {"weight": Evil()}}, nn.Linear(1, 1)])
def test_code_is_not_run(tmp_path, capsys, content):
    torch.save(content, tmp_path / "evil.pth")
    assert "code in a file is never run" in refused(tmp_path / "evil.pth")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(content, protocol=2))
    refused(tmp_path / "pickle.pth")
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "came"),
    [
        ([torch.zeros(1)], "'list'"),
        (torch.zeros(1), "'Tensor'"),
        ({"epoch": 3, "weight": torch.zeros(1)}, "epoch, weight are not all tensors"),
        ({"model": {"name": "resnet50"}}, "name are not all tensors"),
        ({0: torch.zeros(1)}, "'int'"),
        (7, "'int'"),
    ],
)
def test_something_else_than_tensors_by_name_is_refused(tmp_path, content, came):
    torch.save(content, tmp_path / "other.pth")
    assert came in refused(tmp_path / "other.pth")


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors", "weights"])
def test_broken_files_are_refused(tmp_path, name):
    path = tmp_path / name
    checkpoints.write(tmp_path / "weights.safetensors", network())
    if not name.endswith("safetensors"):
        torch.save(network().state_dict(), path)
    whole = path.read_bytes()
    for content in (b"", whole[:7], whole[: len(whole) // 2], whole[:-9], b"<html>not found</html>", bytes(500)):
        path.write_bytes(content)
        assert f"got {len(content):,} bytes" in refused(path)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), suffix=st.sampled_from(["pth", "safetensors"]))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_no_broken_file_goes_further_than_a_sentence(tmp_path_factory, data, suffix):
    """Whatever bytes are changed or cut off: tensors come back, or the sentence does."""
    path = tmp_path_factory.getbasetemp() / f"changed.{suffix}"
    weights = nn.Linear(2, 2).state_dict()
    (save_file if suffix == "safetensors" else torch.save)(weights, path)
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        checkpoints.read(path)
    except RuntimeError:
        refused(path)


# fill ----------------------------------------------------------------------------------------------------------------


def test_fill_is_strict_but_for_counters():
    source, target = network(), network(1)
    state = {name: tensor for name, tensor in source.state_dict().items() if "batches" not in name}
    checkpoints.fill(target, state, "old.pth")
    assert same(target.state_dict(), source.state_dict())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda state: state.pop("1.running_var"), r"it lacks 1.running_var\."),
        (lambda state: state.clear(), r"it lacks 0.weight, 0.bias, 1.weight, 1.bias and 4 more\."),
        (lambda state: state.update({"9.weight": torch.zeros(1)}), r"it holds besides 9.weight\."),
        (
            lambda state: state.update({"2.bias": torch.zeros(3)}),
            r"it has other shapes: 2.bias \(3,\) instead of \(2,\)\.",
        ),
    ],
)
def test_what_does_not_fit_changes_nothing(change, sentence):
    state, target = network().state_dict(), network(1)
    change(state)
    with pytest.raises(RuntimeError, match=f"old.pth does not fit Sequential: {sentence} Build the network"):
        checkpoints.fill(target, state, "old.pth")
    assert same(target.state_dict(), network(1).state_dict())


# bombs ----------------------------------------------------------------------------------------------------------------


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    torch.save({"weight": torch.zeros(2_000_000)}, tmp_path / "stored.pth")
    with zipfile.ZipFile(tmp_path / "stored.pth") as whole, zipfile.ZipFile(tmp_path / "bomb.pth", "w", 8) as packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    assert len(checkpoints.read(tmp_path / "stored.pth")[0]) == 1
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpacked"))
    assert "its parts claim 8,0" in refused(tmp_path / "bomb.pth")


def test_memory_without_numbers_is_refused(tmp_path, monkeypatch):
    """An array of bytes of any length is a name in a pickle, and torch would make it."""
    (tmp_path / "a.pth").write_bytes(b"\x80\x02c__builtin__\nbytearray\nq\0(J\xff\xff\xff\x7ftq\x01Rq\x02.")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("made"))
    assert "asks for memory without numbers" in refused(tmp_path / "a.pth")


@pytest.mark.parametrize("tensor", [torch.eye(3).to_sparse(), torch.empty(3, device="meta")])
def test_tensors_without_plain_numbers_are_refused(tmp_path, tensor):
    torch.save({"weight": tensor}, tmp_path / "a.pth")
    assert "weight are not all tensors with numbers" in refused(tmp_path / "a.pth")


@pytest.mark.parametrize("about", ["{", "[1]", "7", '"x"'])
def test_words_of_a_file_that_are_no_table_are_refused(tmp_path, about):
    save_file(network().state_dict(), tmp_path / "a.safetensors", {"about": about})
    refused(tmp_path / "a.safetensors")


def test_pipes_and_links_to_themselves_are_named(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "loop.pth").symlink_to("loop.pth")
    with pytest.raises(RuntimeError, match=r"expected at .*pipe.pth, got a folder or pipe"):
        checkpoints.read(tmp_path / "pipe.pth")
    with pytest.raises(FileNotFoundError, match=r"expected at .*loop.pth, got nothing"):
        checkpoints.read(tmp_path / "loop.pth")


def test_names_in_a_sentence_are_few_and_short(tmp_path):
    state = {f"{'x' * 100_000}{number}": torch.zeros(1) for number in range(50)}
    with pytest.raises(RuntimeError, match=r"and 46 more. Build the network") as error:
        checkpoints.fill(network(), network().state_dict() | state, "a.pth")
    assert len(str(error.value)) < 1200
