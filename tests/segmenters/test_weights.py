import functools
import hashlib
import http.server
import pickle
import re
import threading
import urllib.error
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from dd.segmenters import deeplabv3 as mmsegmentation
from dd.segmenters.deeplabv3 import DeepLabV3, DeepLabV3Settings, deeplabv3_config
from dd.segmenters.weights import load_pretrained, read_weights, weights_url

# after the placeholder for compiled operations, which dd.segmenters installs
from mmengine.logging import HistoryBuffer  # isort: skip
from mmseg.registry import MODELS  # isort: skip


def backbone(depth):
    """A ResNetV1c; the large ones without numbers."""
    with torch.device("cpu" if depth == 18 else "meta"), mmsegmentation.quiet_construction():
        return MODELS.build(deeplabv3_config(2, DeepLabV3Settings(depth=depth))["backbone"])


def backbone_file(path, depth=18, **extra):
    weights = {**DeepLabV3(2, depth=depth).backbone.state_dict(), **extra}
    if path.suffix == ".safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path)
    return weights


@pytest.mark.parametrize("name", ["resnet18.safetensors", "resnet18.pth"])
def test_backbone_from_a_file(tmp_path, name):
    weights = backbone_file(
        tmp_path / name, **{"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    )
    model = DeepLabV3(4, depth=18, pretrained=str(tmp_path / name))
    assert all(torch.equal(w, weights[k]) for k, w in model.backbone.state_dict().items())
    assert model.files == {"pretrained": hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}
    assert DeepLabV3(4, depth=18).files == {}


def test_backbone_from_a_runner_checkpoint_with_its_log(tmp_path):
    """What mmengine's Runner saves, which torch.load refuses: HistoryBuffer, numpy arrays,
    getattr."""
    backbone = DeepLabV3(2, depth=18).backbone.state_dict()
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    checkpoint = {
        "state_dict": {f"module.backbone.{k}": w for k, w in backbone.items()},
        "message_hub": {"log_scalars": {"train/loss": history}, "runtime_info": {"iter": 3}},
    }
    torch.save(checkpoint, tmp_path / "iter_3.pth")
    allowed = torch.serialization.get_safe_globals()
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "iter_3.pth", weights_only=True)
    model = DeepLabV3(4, depth=18, pretrained=str(tmp_path / "iter_3.pth"))
    assert all(torch.equal(w, backbone[k]) for k, w in model.backbone.state_dict().items())
    assert set(torch.serialization.get_safe_globals()) == set(allowed)


def test_whole_model_from_a_file(tmp_path, caplog):
    source = DeepLabV3(3, depth=18)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "whole.pth")
    same = DeepLabV3(3, depth=18, pretrained=str(tmp_path / "whole.pth"))
    assert all(torch.equal(w, source.state_dict()[k]) for k, w in same.state_dict().items())

    other = DeepLabV3(5, depth=18)
    left = load_pretrained(other, str(tmp_path / "whole.pth"))
    assert sorted(left) == [
        f"{h}.conv_seg.{p}" for h in ("auxiliary_head", "decode_head") for p in ("bias", "weight")
    ]
    assert "made for another number of classes" in caplog.text
    assert all(
        torch.equal(w, source.state_dict()[k])
        for k, w in other.state_dict().items()
        if k not in left
    )


@pytest.mark.parametrize(("depth", "other"), [(50, 101), (101, 50), (50, 18)])
def test_weights_of_another_depth_are_refused(tmp_path, depth, other):
    """The authors' R101 was started from the R50 file: 45 of its blocks stayed random."""
    weights = {k: torch.empty(0) for k in backbone(other).state_dict()}
    torch.save(weights, tmp_path / "other.pth")
    model = torch.nn.Module()
    model.backbone = backbone(depth)
    message = (
        rf"other.pth, which holds a ResNetV1c of depth {other}, does not fit a ResNetV1c of depth "
        rf"{depth}: "
        rf".*open-mmlab://resnet{depth}_v1c"
    )
    with pytest.raises(ValueError, match=message):
        load_pretrained(model, str(tmp_path / "other.pth"))


def test_weights_of_another_variant_are_refused(tmp_path):
    """torchvision's ResNet begins with one 7x7 convolution, v1c with three 3x3."""
    weights = {
        k.replace("stem.0", "conv1"): w
        for k, w in DeepLabV3(2, depth=18).backbone.state_dict().items()
    }
    weights = {k: w for k, w in weights.items() if not k.startswith("stem.")}
    torch.save(weights, tmp_path / "resnet18.pth")
    with pytest.raises(
        ValueError,
        match=r"holds a ResNet \(v1b, torchvision's\) of depth 18, does not fit.*stem.0.weight",
    ):
        load_pretrained(DeepLabV3(2, depth=18), str(tmp_path / "resnet18.pth"))


def test_weights_that_do_not_fit(tmp_path):
    weights = backbone_file(tmp_path / "resnet18.pth")
    model = DeepLabV3(2, depth=18)
    before = {k: w.clone() for k, w in model.state_dict().items()}
    for wrong, message in (
        ({**weights, "layer9.0.conv1.weight": torch.zeros(1)}, r"1 unexpected \(layer9"),
        (
            {**weights, "layer1.0.conv1.weight": torch.zeros(1)},
            r"1 of another shape \(layer1.0.conv1.weight",
        ),
        (
            {k: w for k, w in weights.items() if k != "stem.0.weight"},
            r"1 missing in the file \(stem.0.weight",
        ),
    ):
        torch.save(wrong, tmp_path / "wrong.pth")
        with pytest.raises(ValueError, match=message):
            load_pretrained(model, str(tmp_path / "wrong.pth"))
    assert all(torch.equal(w, before[k]) for k, w in model.state_dict().items())


@pytest.mark.parametrize(
    "wrapped", [lambda w: {"model": w}, lambda w: {f"model.{k}": v for k, v in w.items()}]
)
def test_weights_under_a_name_of_their_own(tmp_path, wrapped):
    weights = backbone_file(tmp_path / "plain.pth")
    torch.save(wrapped(weights), tmp_path / "wrapped.pth")
    model = DeepLabV3(4, depth=18, pretrained=str(tmp_path / "wrapped.pth"))
    assert all(torch.equal(w, weights[k]) for k, w in model.backbone.state_dict().items())


@pytest.mark.parametrize("name", ["resnet18.safetensors", "resnet18.pth"])
def test_numbers_that_are_not_finite(tmp_path, name):
    backbone_file(tmp_path / name, **{"fc.weight": torch.tensor([1.0, torch.nan])})
    with pytest.raises(
        ValueError,
        match=r"1 of its \d+ tensors hold numbers that are not finite, such as fc.weight",
    ):
        read_weights(str(tmp_path / name))


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("content", ["attack", "module", "list", "text", "safetensors"])
def test_other_content_is_refused_and_never_executed(tmp_path, content):
    file, trace = (
        tmp_path / ("weights.safetensors" if content == "safetensors" else "weights.pth"),
        tmp_path / "executed",
    )
    if content in ("text", "safetensors"):
        file.write_text("<html>404</html>")
    else:
        torch.save(
            {"attack": {"state_dict": Attack(trace)}, "module": torch.nn.ReLU(), "list": [1]}[
                content
            ],
            file,
        )
    with pytest.raises(ValueError, match="weights.*: refused.*as .safetensors instead"):
        read_weights(str(file))
    assert not trace.exists()


def test_unknown_sources(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="no such file; allowed: a .safetensors or .pth file, open-mmlab://"
    ):
        read_weights(str(tmp_path / "absent.pth"))
    with pytest.raises(ValueError, match="did you mean .*resnet50_v1c"):
        read_weights("open-mmlab://resnet50_v1x")


@pytest.mark.parametrize("name", ["resnet18_v1c", "resnet50_v1c", "resnet101_v1c"])
def test_each_depth_has_its_own_file(name):
    url = weights_url(f"open-mmlab://{name}")
    assert url.startswith("https://") and re.search(rf"/{name}-[0-9a-f]{{8}}\.pth$", url)
    assert weights_url("torchvision://resnet50").startswith(
        "https://download.pytorch.org/models/resnet50-"
    )


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """``downloads(answer)``: every download is answered by ``answer(url, target, hash_prefix)``
    instead."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def install(answer):
        monkeypatch.setattr(
            torch.hub,
            "download_url_to_file",
            lambda url, target, hash_prefix, progress: answer(url, Path(target), hash_prefix),
        )

    return install


def test_hub_name_is_downloaded_once_and_its_hash_is_asked_for(downloads):
    asked = []

    def answer(url, target, hash_prefix):
        asked.append((url, hash_prefix))
        backbone_file(target)

    downloads(answer)
    for _ in range(2):
        DeepLabV3(2, depth=18, pretrained="open-mmlab://resnet18_v1c")
    ((url, digest),) = asked
    assert (
        url.startswith("https://")
        and url.endswith(f"resnet18_v1c-{digest}.pth")
        and len(digest) == 8
    )


def test_another_file_than_the_name_promises_is_refused(tmp_path, monkeypatch):
    """A real download, from a local server, of a file whose name ends with another hash; then
    with the right one."""
    folder = tmp_path / "served"
    folder.mkdir()
    content = save(backbone(18).state_dict())
    right = f"resnet18-{hashlib.sha256(content).hexdigest()[:8]}.safetensors"
    for name in ("resnet18-00000000.safetensors", right):
        (folder / name).write_bytes(content)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "cache"))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with pytest.raises(
            ValueError,
            match="is not the file that its name promises .*invalid hash.*pretrained=/path/to",
        ):
            read_weights(f"{url}/resnet18-00000000.safetensors")
        with pytest.raises(FileNotFoundError, match="cannot download .*404"):
            read_weights(f"{url}/absent-00000000.pth")
        assert not list((tmp_path / "cache/checkpoints").iterdir())
        assert len(read_weights(f"{url}/{right}")) == len(backbone(18).state_dict())
        server.shutdown()


def test_without_network_the_error_names_the_file_to_bring(downloads):
    def answer(*_):
        raise urllib.error.URLError("no route to host")

    downloads(answer)
    with pytest.raises(
        FileNotFoundError,
        match=r"cannot download https://.*no route to "
        r"host.*pretrained=/path/to/resnet50_v1c-\w+\.pth",
    ):
        DeepLabV3(2, depth=50, pretrained="open-mmlab://resnet50_v1c")
