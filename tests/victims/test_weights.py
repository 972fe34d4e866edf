import hashlib
import io
import pickle
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from dipguard.victims import load_state_dict_strict


def _net(seed, channels=4):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.Flatten(), nn.Linear(channels * 36, 5))


def _prefixed(state, prefix):
    return {f"{prefix}{key}": value for key, value in state.items()}


FORMS = {
    "plain": lambda state: state,
    "checkpoint": lambda state: {"state_dict": state, "epoch": 3, "best": 0.9},
    "parallel": lambda state: _prefixed(state, "module."),
    "checkpoint of parallel": lambda state: {"state_dict": _prefixed(state, "module.")},
    "before torch 0.4.1": lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
    "model_state_dict": lambda state: {"model_state_dict": _prefixed(state, "module.model."), "optimizer": {}},
    "compiled": lambda state: {"model": _prefixed(state, "_orig_mod.")},
    "net": lambda state: {"net": state, "epoch": 1},
    "Lightning": lambda state: {"state_dict": _prefixed(state, "model._orig_mod."), "hyper_parameters": {"lr": 0.1}},
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_file_loads_exactly(tmp_path, form):
    source, target = _net(1), _net(2)
    torch.save(FORMS[form](source.state_dict()), tmp_path / "weights.pt")
    assert load_state_dict_strict(target, tmp_path / "weights.pt") is target
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value), key


def test_half_precision_becomes_float32(tmp_path):
    source, target = _net(1), _net(2)
    half = {key: value.half() if value.is_floating_point() else value for key, value in source.state_dict().items()}
    torch.save(half, tmp_path / "weights.pt")
    load_state_dict_strict(target, str(tmp_path / "weights.pt"))
    assert {value.dtype for value in target.state_dict().values()} == {torch.float32, torch.int64}
    assert torch.equal(target[0].weight, source[0].weight.half().float())


def test_double_precision_stays(tmp_path):
    source, target = _net(1).double(), _net(2).double()
    torch.save(source.state_dict(), tmp_path / "weights.pt")
    load_state_dict_strict(target, tmp_path / "weights.pt")
    assert torch.equal(target[0].weight, source[0].weight)


def test_safetensors_load(tmp_path):
    source, target = _net(1), _net(2)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    load_state_dict_strict(target, tmp_path / "weights.safetensors")
    assert torch.equal(target[3].weight, source[3].weight)


def _renamed(state):
    return {key.replace("3.", "fc."): value for key, value in state.items()}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _renamed(_net(1).state_dict()), r"missing: 3\.weight, 3\.bias; unexpected: fc\.weight, fc\.bias"),
        (lambda: _net(1, channels=8).state_dict(), r"0\.weight \(8, 3, 3, 3\) instead of \(4, 3, 3, 3\).*and 4 more"),
        (lambda: {**_net(1).state_dict(), "extra": torch.zeros(1)}, "unexpected: extra"),
        (lambda: {}, "state dict"),
        (lambda: torch.zeros(3), "state dict"),
        (lambda: {"epoch": 3}, "state dict"),
    ],
    ids=["other names", "other shapes", "extra", "empty", "tensor", "numbers"],
)
def test_weights_of_something_else_are_refused_and_leave_the_network_alone(tmp_path, make, message):
    torch.save(make(), tmp_path / "weights.pt")
    target = _net(2)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(ValueError, match=f"`victim.weights`.*weights.pt.*{message}"):
        load_state_dict_strict(target, tmp_path / "weights.pt")
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


def test_the_message_names_the_argument_and_what_was_expected(tmp_path):
    torch.save({"x": torch.zeros(1)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"`weights`.*this Sequential \(9 tensors, 1,055 parameters\)"):
        load_state_dict_strict(_net(2, channels=5), tmp_path / "weights.pt", argument="weights")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights", "cut"], ids=["empty", "text", "cut off"])
def test_damaged_files_are_refused(tmp_path, suffix, content):
    path = tmp_path / f"weights{suffix}"
    state = _net(1).state_dict()
    if suffix == ".pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    path.write_bytes(path.read_bytes()[:1500] if content == "cut" else content)
    with pytest.raises(ValueError, match=r"`victim.weights`.*damaged"):
        load_state_dict_strict(_net(2), path)


class _Payload:
    def __reduce__(self):
        return print, ("code from a weights file ran",)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_code_in_a_file_is_never_run(tmp_path, capsys, save):
    save({"state_dict": _Payload()}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"weights.pt holds pickled objects besides tensors \(.*print\)"):
        load_state_dict_strict(_net(2), tmp_path / "weights.pt")
    assert capsys.readouterr().out == ""


def test_a_checkpoint_with_other_objects_is_not_called_damaged(tmp_path):
    torch.save({"state_dict": _net(1).state_dict(), "args": Namespace(lr=0.1)}, tmp_path / "weights.pt")
    message = r"besides tensors \(argparse\.Namespace\).*save its state dict alone"
    with pytest.raises(ValueError, match=message) as caught:
        load_state_dict_strict(_net(2), tmp_path / "weights.pt")
    assert "\x1b" not in str(caught.value)


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Addresses and their files; what is fetched from them is noted."""
    files, fetched = {}, []

    def download(url, path, hash_prefix=None, progress=True):
        fetched.append(url)
        content = files[url]
        if hash_prefix and not hashlib.sha256(content).hexdigest().startswith(hash_prefix):
            raise RuntimeError("invalid hash value")
        Path(path).write_bytes(content)

    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    monkeypatch.setenv("DIPGUARD_CACHE", str(tmp_path / "cache"))
    return files, fetched


def _content(seed):
    buffer = io.BytesIO()
    torch.save(_net(seed).state_dict(), buffer)
    return buffer.getvalue()


def test_downloads_are_kept_by_address_and_checked_each_time(server, tmp_path):
    files, fetched = server
    urls = ["https://a.example/model.pth", "https://b.example/model.pth"]
    for seed, url in enumerate(urls, start=1):
        files[url] = _content(seed)
        for _ in range(2):
            assert torch.equal(load_state_dict_strict(_net(9), url)[0].weight, _net(seed)[0].weight)
    assert fetched == urls
    for kept in (tmp_path / "cache").rglob("model.pth"):
        kept.write_bytes(_content(7))
    assert torch.equal(load_state_dict_strict(_net(9), urls[0])[0].weight, _net(1)[0].weight)
    assert fetched == [*urls, urls[0]]


def test_a_hash_in_the_address_is_checked(server):
    files, _ = server
    digest = hashlib.sha256(_content(1)).hexdigest()
    good, bad, dated = (f"https://a.example/m-{part}.pt" for part in (digest[:8], "01234567", "20240315"))
    files |= {good: _content(1), bad: _content(1), dated: _content(1)}
    for address in (good, dated):
        load_state_dict_strict(_net(9), address)
    with pytest.raises(RuntimeError, match=r"could not be fetched.*invalid hash"):
        load_state_dict_strict(_net(9), bad)


@pytest.mark.parametrize("name", ["nowhere.pt", "."])
def test_missing_files_and_folders_are_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=r"`victim.weights`"):
        load_state_dict_strict(_net(2), tmp_path / name)


def test_a_download_that_fails_says_what_to_do_instead():
    with pytest.raises(RuntimeError, match=r"`victim.weights`.*https://127\.0\.0\.1.*give its path"):
        load_state_dict_strict(_net(2), "https://127.0.0.1:9/weights-0123abcd.pt")
