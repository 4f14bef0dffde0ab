"""Files that hold code, objects of other packages, or nonsense: nothing in them runs."""

import io
import os
import pickle
import subprocess
import sys
import tarfile
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cpq_train.common.errors import UserError
from cpq_train.interop.foreign_file import foreign_state, read_foreign

pytestmark = [
    pytest.mark.filterwarnings("ignore:Detected pickle protocol 4"),
    pytest.mark.filterwarnings("ignore:.*looks like a TorchScript archive"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
]

WEIGHTS = {"backbone_3d.conv_input.1.bias": torch.arange(4.0), "global_step": torch.tensor([1])}
MARK = "executed"


class Call:
    """Unpickles as the result of a call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


class Subclass(OrderedDict[str, Any]):
    """Unpickles by its own class, which is none of torch's."""

    def __setstate__(self, state: Any) -> None:
        Path(MARK).touch()


def _zip(content: Any, path: Path) -> None:
    torch.save(content, path)


def _legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def _pickle(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


def _pickle_4(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=4))


def _zip_4(content: Any, path: Path) -> None:
    torch.save(content, path, pickle_protocol=4)


PAYLOADS: dict[str, Callable[[], Any]] = {
    "posix.system": lambda: Call(os.system, f"touch {MARK}"),
    "builtins.exec": lambda: Call(exec, f"open({MARK!r}, 'w')"),
    "builtins.open": lambda: Call(open, MARK, "w"),
    "subprocess.call": lambda: Call(subprocess.call, ["touch", MARK]),
    "Path.touch": lambda: Call(Path.touch, Path(MARK)),
    "getattr of a path": lambda: Call(getattr, Path(MARK), "touch"),
    "torch.load": lambda: Call(torch.load, MARK),
    "numpy.save": lambda: Call(np.save, MARK, [1]),
    "a subclass of OrderedDict": lambda: Subclass(a=1),
}

PLACES: dict[str, Callable[[Any], Any]] = {
    "the file": lambda code: code,
    "the weights": lambda code: {"model_state": {**WEIGHTS, "vfe.weight": code}},
    "beside the weights": lambda code: {"model_state": WEIGHTS, "meta": {"hook": [code]}},
    "a key": lambda code: {"model_state": WEIGHTS, "optimizer_state": [(code, 1)]},
}


@pytest.fixture(autouse=True)
def _inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whatever runs leaves a mark; nothing may."""
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.glob(f"{MARK}*"))


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("write", [_zip, _legacy, _zip_4, _pickle, _pickle_4])
def test_code_is_refused(
    payload: str, place: str, write: Callable[[Any, Path], None], tmp_path: Path
) -> None:
    path = tmp_path / "f.pth"
    write(PLACES[place](PAYLOADS[payload]()), path)
    found = "is corrupt|holds pickled code" if write in (_pickle, _pickle_4) else "holds pickled code"
    with pytest.raises(UserError, match=rf"f\.pth' ({found})"):
        read_foreign(path)


def test_the_payloads_would_run(tmp_path: Path) -> None:
    """Read without care they leave the mark: the tests above can fail."""
    for payload in PAYLOADS:
        if payload in ("getattr of a path", "torch.load"):
            continue  # harmless in themselves
        code = PAYLOADS[payload]()
        if isinstance(code, Subclass):
            code.attribute = 1
        _zip(PLACES["beside the weights"](code), tmp_path / "f.pth")
        torch.load(tmp_path / "f.pth", weights_only=False)
        for mark in tmp_path.glob(f"{MARK}*"):
            mark.unlink()
            break
        else:
            pytest.fail(f"{payload} left no mark")


def test_a_refusal_names_the_function(tmp_path: Path) -> None:
    _zip({"model_state": WEIGHTS, "x": PAYLOADS["posix.system"]()}, tmp_path / "f.pth")
    with pytest.raises(UserError, match=r"holds pickled code and is refused \(posix\.system\); accepted"):
        read_foreign(tmp_path / "f.pth")


@pytest.fixture
def history_buffer(monkeypatch: pytest.MonkeyPatch) -> type:
    """mmengine's log of a number, which the package pickles with its own methods."""

    class HistoryBuffer:
        def __init__(self) -> None:
            self.log = np.arange(3.0)

        def mean(self) -> float:
            return float(self.log.mean())

        def __getstate__(self) -> dict[str, Any]:
            return {"log": self.log, "statistics_methods": {"mean": HistoryBuffer.mean}}

        def __setstate__(self, state: dict[str, Any]) -> None:
            Path(MARK).touch()

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = "mmengine.logging.history_buffer", "HistoryBuffer"
    HistoryBuffer.mean.__module__ = HistoryBuffer.__module__
    HistoryBuffer.mean.__qualname__ = "HistoryBuffer.mean"
    for name in ("mmengine", "mmengine.logging", HistoryBuffer.__module__):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules[HistoryBuffer.__module__].HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    return HistoryBuffer


@pytest.mark.parametrize("write", [_zip, _legacy])
def test_logs_and_numbers_beside_the_weights(write: Any, history_buffer: type, tmp_path: Path) -> None:
    content = {
        "meta": {"seed": np.int64(3), "time": np.float32(1.5), "names": ("car",), "none": np.array([])},
        "message_hub": {"log_scalars": {"train/loss": history_buffer()}},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2), "step": np.ones((2, 3))}}},
        "state_dict": WEIGHTS,
    }
    write(content, tmp_path / "f.pth")
    state = foreign_state(read_foreign(tmp_path / "f.pth"), "f.pth")
    assert list(state) == list(WEIGHTS)
    assert all(torch.equal(tensor, WEIGHTS[name]) for name, tensor in state.items())
    # The list of what is admitted is back to what it was.
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "f.pth", weights_only=True)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (np.ones(3), "an object of NumPy or mmengine"),
        (np.float64(1), "an object of NumPy or mmengine"),
        (torch.ones(2, 2).to_sparse(), "a Tensor"),
        (torch.ones(2, device="meta"), "a Tensor"),
        ([torch.ones(1)], "a list"),
    ],
)
def test_only_plain_tensors_are_weights(value: Any, kind: str, tmp_path: Path) -> None:
    _zip({"state_dict": {**WEIGHTS, "x": value}}, tmp_path / "f.pth")
    with pytest.raises(UserError, match=f"is no state dict: 'x' is {kind}; expected tensors"):
        foreign_state(read_foreign(tmp_path / "f.pth"), "f.pth")


@pytest.mark.parametrize("write", [_zip, _legacy])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_file(write: Any, share: float, tmp_path: Path) -> None:
    write({"model_state": {**WEIGHTS, "w": torch.ones(500)}}, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    (tmp_path / "f.pth").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match=r"f\.pth' is (corrupt|compressed)"):
        read_foreign(tmp_path / "f.pth")


@pytest.mark.parametrize("content", [b"a text\n", bytes(range(256)) * 8, b"PK\x03\x04nonsense", b"\x80\x02"])
def test_no_checkpoint_at_all(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "f.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"f\.pth' (is corrupt|holds pickled code)"):
        read_foreign(tmp_path / "f.pth")


def test_archives_of_other_kinds(tmp_path: Path) -> None:
    torch.jit.script(torch.nn.ReLU()).save(str(tmp_path / "f.pth"))
    with pytest.raises(UserError, match=r"f\.pth' is (corrupt|compressed)"):
        read_foreign(tmp_path / "f.pth")
    # Torch's oldest format, whose members were extracted by name.
    with tarfile.open(tmp_path / "f.pth", "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(UserError, match=r"f\.pth' is (corrupt|compressed)"):
        read_foreign(tmp_path / "f.pth")
