import hashlib
import sys

import pytest
import torch
import torch.nn.functional as F

from dd import config
from dd.segmenters import _compiled_ops
from dd.segmenters.deeplabv3 import DeepLabV3
from dd.segmenters.mmseg_config import (
    CONFIGS,
    ModelZoo,
    config_file,
    for_classes,
    read_config,
    take_weights,
)

DEEPLAB = "deeplabv3/deeplabv3_r18-d8_4xb2-80k_cityscapes-512x1024"
MIT = "segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512"
FCN = "fcn/fcn_r18-d8_4xb2-80k_cityscapes-512x1024"
OCR = "ocrnet/ocrnet_hr18s_4xb4-20k_voc12aug-512x512"
PSP = "pspnet/pspnet_r50-d8_4xb4-40k_voc12aug-512x512"
placeholder = pytest.mark.skipif(
    not isinstance(sys.modules[_compiled_ops.NAME], _compiled_ops.Placeholder),
    reason="full mmcv is installed",
)


def batch(size=(64, 64)):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, *size), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 4, (2, *size), generator=generator)
    labels[:, : size[0] // 3] = 255
    return images, labels


# Names


def test_a_configuration_is_found_by_its_name():
    for name in (PSP, f"{PSP}.py", PSP.partition("/")[2]):
        assert config_file(name) == CONFIGS / f"{PSP}.py"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("pspnet/pspnet_r50-d8_4xb4-40k_voc12-512x512", PSP),
        ("deeplabv3plus", "near: deeplabv3plus/deeplabv3plus_"),
        ("", "models: ann, apcnet"),
        ("_base_/models/pspnet_r50-d8", "has no such configuration"),
        ("../../../mmseg/version", "has no such configuration"),
    ],
)
def test_an_unknown_name_lists_near_ones(name, near):
    with pytest.raises(ValueError, match="no such configuration among its [0-9]{3}") as error:
        config_file(name)
    assert near in str(error.value)


def test_a_file_is_executed_only_if_it_is_trusted(tmp_path):
    trace, file = tmp_path / "executed", tmp_path / "mine.py"
    file.write_text(f"open({str(trace)!r}, 'w')\nmodel = dict(type='Other')\n")
    with pytest.raises(ValueError, match="outside mmsegmentation.*executes it.*trusted=true"):
        ModelZoo(4, config=str(file))
    assert not trace.exists()
    with pytest.raises(ValueError, match="of type 'Other'; allowed: EncoderDecoder"):
        ModelZoo(4, config=str(file), trusted=True)
    assert trace.exists()


@placeholder
def test_what_needs_compiled_operations_is_refused_when_it_is_built():
    with pytest.raises(
        ValueError, match=r"PSAMask, of mmcv's compiled operations.*full mmcv 2\.1\.0"
    ):
        ModelZoo(4, config="psanet/psanet_r50-d8_4xb4-20k_voc12aug-512x512")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "mask2former/mask2former_r50_8xb2-160k_ade20k-512x512",
            "needs a package that is not installed.*mmdet",
        ),
        ("san/san-vit-b16_coco-stuff164k-640x640", "of type 'MultimodalEncoderDecoder'; allowed"),
        ("pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes", "edge maps"),
    ],
)
def test_what_this_package_cannot_run_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        ModelZoo(4, config=name)


# What is changed in a configuration


def test_classes_are_replaced_in_every_head():
    model = read_config("knet/knet-s3_r50-d8_deeplabv3_8xb2-adamw-80k_ade20k-512x512")
    for_classes(model, 7)
    head = model["decode_head"]
    assert (
        head["kernel_generate_head"]["num_classes"] == model["auxiliary_head"]["num_classes"] == 7
    )
    assert [h["num_classes"] for h in head["kernel_update_head"]] == [7, 7, 7]
    model = read_config("ddrnet/ddrnet_23-slim_in1k-pre_2xb6-120k_cityscapes-1024x1024")
    assert len(model["decode_head"]["loss_decode"][0]["class_weight"]) == 19
    for_classes(model, 7)
    assert all(loss["class_weight"] is None for loss in model["decode_head"]["loss_decode"])
    for_classes(model := read_config("bisenetv2/bisenetv2_fcn_4xb4-160k_cityscapes-1024x1024"), 7)
    assert [h["num_classes"] for h in model["auxiliary_head"]] == [7, 7, 7, 7]


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        (DEEPLAB, "open-mmlab://resnet18_v1c"),
        (MIT, "https://download.openmmlab.com/"),
        (PSP, "open-mmlab://resnet50_v1c"),
    ],
)
def test_pretrained_weights_are_taken_out(name, weights):
    model = read_config(name)
    assert take_weights(model).startswith(weights)
    assert (
        take_weights(model) is None
        and "Pretrained" not in str(model)
        and "open-mmlab" not in str(model)
    )


def test_colours_are_those_of_the_configuration(tmp_path):
    text = (
        f"_base_ = [{str(CONFIGS / DEEPLAB)!r} + '.py']\nmodel = "
        f"dict(data_preprocessor=dict({{}}))\n"
    )
    own = tmp_path / "own.py"
    own.write_text(text.format("mean=[1.0, 2.0, 3.0], std=[2.0, 4.0, 8.0], bgr_to_rgb=False"))
    model, seen = ModelZoo(4, config=str(own), trusted=True).eval(), []
    model.net.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(
            torch.tensor([13.0, 10.0, 5.0]).view(1, 3, 1, 1).expand(2, 3, 64, 64)
        )  # RGB; theirs is BGR: 5, 10, 13
    assert seen[0][0, :, 0, 0].tolist() == [(5 - 1) / 2, (10 - 2) / 4, (13 - 3) / 8]


# Training


@pytest.mark.parametrize("name", [DEEPLAB, MIT, OCR])
def test_small_models_of_the_zoo_take_a_training_step(name):
    torch.manual_seed(0)
    model, (images, labels) = ModelZoo(4, config=name), batch()
    losses = model.loss(images, labels)
    named = [value for key, value in losses.items() if "loss" in key and key != "loss"]
    torch.testing.assert_close(losses["loss"], sum(named))
    losses["loss"].backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None]
    groups = model.parameter_groups(1e-4, 1e-2, 0.1)
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    assert {id(p) for p in groups[0]["params"]} == {id(p) for p in model.net.backbone.parameters()}
    assert groups[0]["lr"] == pytest.approx(1e-5) and groups[1]["lr"] == 1e-4
    kinds = {type(m) for m in model.modules() if "BatchNorm" in type(m).__name__}
    assert kinds == {torch.nn.SyncBatchNorm}
    with torch.no_grad():
        assert model.eval()(images[:, :, :61, :50]).shape == (2, 4, 61, 50)
        with pytest.raises(ValueError, match="one image in training mode"):
            model.train()(images[:1])


def test_deeplabv3_by_name_is_our_deeplabv3():
    torch.manual_seed(0)
    zoo, ours, (images, labels) = (
        ModelZoo(4, config=DEEPLAB, sync_bn=False),
        DeepLabV3(4, depth=18),
        batch(),
    )
    ours.load_state_dict(zoo.net.state_dict())
    found = []
    for model in (zoo, ours):
        torch.manual_seed(1)
        found.append(model.train().loss(images, labels))
    assert all(
        torch.equal(found[0][k], found[1][k]) for k in ("loss", "decode.loss_ce", "aux.loss_ce")
    )
    with torch.no_grad():
        assert torch.equal(zoo.eval()(images), ours.eval()(images))


def test_two_classes_are_two_outputs():
    model, (images, labels) = (
        ModelZoo(2, config="unet/unet-s5-d16_fcn_4xb4-40k_chase-db1-128x128"),
        batch((128, 128)),
    )
    labels = labels.clamp(max=1).masked_fill(labels == 255, 255)
    assert torch.isfinite(model.loss(images, labels)["loss"])
    with torch.no_grad():
        logits = model.eval()(images)
        assert logits.shape == (2, 2, 128, 128)
        whole = model.net.encode_decode(
            model.normalise(images), [{"img_shape": torch.Size((128, 128))}]
        )
    assert model.net.test_cfg.mode == "slide"
    torch.testing.assert_close(logits, whole)  # the one window covers the image


# Weights


def test_the_weights_that_the_configuration_names(tmp_path, monkeypatch):
    """A ResNet must fit in every tensor; other backbones load theirs themselves."""
    asked = []

    def download(url, target, hash_prefix, progress):
        asked.append(url)
        torch.save(made, target)

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for name in (DEEPLAB, MIT):
        made = {
            k: torch.rand_like(w) if w.is_floating_point() else w
            for k, w in ModelZoo(4, config=name).net.backbone.state_dict().items()
        }
        model = ModelZoo(4, config=name, pretrained="config")
        assert all(torch.equal(w, made[k]) for k, w in model.net.backbone.state_dict().items())
        downloaded = tmp_path / "checkpoints" / asked[-1].rpartition("/")[2]
        assert model.files["pretrained"] == hashlib.sha256(downloaded.read_bytes()).hexdigest()
    assert "resnet18_v1c" in asked[0] and "mit_b0" in asked[1]
    other = ModelZoo(7, config=MIT)
    torch.save({"state_dict": other.net.state_dict()}, tmp_path / "whole.pth")
    model = ModelZoo(4, config=MIT, pretrained=str(tmp_path / "whole.pth"))
    assert all(
        torch.equal(w, other.net.backbone.state_dict()[k])
        for k, w in model.net.backbone.state_dict().items()
    )
    with pytest.raises(ValueError, match="names no weights"):
        ModelZoo(4, config="unet/unet-s5-d16_fcn_4xb4-40k_chase-db1-128x128", pretrained="config")


def test_random_weights_need_no_file(monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: pytest.fail("downloads"))
    with torch.no_grad():
        x = torch.randn(2, 3, 64, 64)
        assert F.softmax(ModelZoo(3, config=DEEPLAB).eval()(x), 1).shape == (2, 3, 64, 64)


def test_a_run_cannot_declare_its_configuration_trusted(tmp_path):
    trace, file = tmp_path / "executed", tmp_path / "mine.py"
    file.write_text(f"open({str(trace)!r}, 'w')\n_base_ = [{str(CONFIGS / DEEPLAB)!r} + '.py']\n")
    node = {
        "_target_": "dd.segmenters.mmseg_config.ModelZoo",
        "config": str(file),
        "pretrained": "config",
        "trusted": True,
    }
    run = {"segmenter": node, "taxonomy": {"names": ["a", "b"]}}
    with pytest.raises(
        ValueError, match="segmenter.trusted=true to train.py, trusted=true to other commands"
    ):
        config.segmenter_of(run)
    assert not trace.exists()
    assert config.segmenter_of(run, trusted=True).num_classes == 3 and trace.exists()
    del run["segmenter"]["trusted"]
    run["segmenter"]["config"] = DEEPLAB
    assert isinstance(config.segmenter_of(run), ModelZoo)


def test_a_configuration_that_was_edited_is_another_model(tmp_path):
    base, file = tmp_path / "base.py", tmp_path / "mine.py"
    base.write_text(f"_base_ = [{str(CONFIGS / DEEPLAB)!r} + '.py']\n")
    file.write_text(f"_base_ = [{str(base)!r}]\n")
    made = ModelZoo(3, config=str(file), trusted=True)
    assert made.files == {
        "config": ModelZoo(3, config=DEEPLAB).files["config"]
    }  # what is built, not what is written
    node = {"_target_": "dd.segmenters.mmseg_config.ModelZoo", "config": str(file), "trusted": True}
    run = {"segmenter": node, "segmenter_files": made.files, "taxonomy": {"names": ["a", "b"]}}
    file.write_text(f"# a remark\n_base_ = [{str(base)!r}]\n")
    assert config.segmenter_of(run, trusted=True).files == made.files
    for edited in (base, file):  # one that it inherits from counts as well
        before = edited.read_text()
        edited.write_text(before + "model = dict(decode_head=dict(dilations=(1, 2, 3, 4)))\n")
        now = ModelZoo(3, config=str(file), trusted=True).files["config"]
        said = (
            rf"mine.py now describes another model \(sha256 {now[:12]}.*trained with \(sha256 "
            rf"{made.files['config'][:12]}"
        )
        with pytest.raises(ValueError, match=said + ".*Restore the file, or train"):
            config.segmenter_of(run, trusted=True)
        edited.write_text(before)


def test_the_code_that_a_configuration_imports_is_part_of_the_model(tmp_path, monkeypatch):
    """A head of one's own, and a module that it imports: an edited line of either is another
    model."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_parts.py").write_text("SCALE = 1.0\n")
    head = (
        "from mmseg.models import FCNHead\nfrom mmseg.registry import MODELS\nimport my_parts\n"
        "@MODELS.register_module(force=True)\nclass MyHead(FCNHead):\n"
        "    def forward(self, x):\n        return super().forward(x) * my_parts.SCALE\n"
    )
    (tmp_path / "my_head.py").write_text(head)
    file = tmp_path / "mine.py"
    file.write_text(
        f"_base_ = [{str(CONFIGS / FCN)!r} + '.py']\nmodel = "
        "dict(decode_head=dict(type='MyHead'))\n"
        "custom_imports = dict(imports=['my_head'], allow_failed_imports=False)\n"
    )

    def files():
        for name in ("my_head", "my_parts"):  # as in a process of its own
            monkeypatch.delitem(sys.modules, name, raising=False)
        return ModelZoo(3, config=str(file), trusted=True).files

    made = files()
    assert (
        set(made) == {"config", "code"}
        and files() == made
        and "code" not in ModelZoo(3, config=FCN).files
    )
    node = {"_target_": "dd.segmenters.mmseg_config.ModelZoo", "config": str(file), "trusted": True}
    run = {"segmenter": node, "segmenter_files": made, "taxonomy": {"names": ["a", "b"]}}
    for name in ("my_parts", "my_head"):
        path = tmp_path / f"{name}.py"
        before = path.read_text()
        path.write_text(before + "# edited\n")
        assert files()["config"] == made["config"] and files()["code"] != made["code"]
        with pytest.raises(
            ValueError, match=r"mine.py now describes, by the code that it imports, another model"
        ):
            config.segmenter_of(run, trusted=True)
        path.write_text(before)


def test_weights_that_were_read_are_known_by_their_hash(tmp_path):
    torch.save(ModelZoo(2, config=DEEPLAB).net.state_dict(), tmp_path / "whole.pth")
    found = ModelZoo(4, config=DEEPLAB, pretrained=str(tmp_path / "whole.pth")).files
    assert found["pretrained"] == hashlib.sha256((tmp_path / "whole.pth").read_bytes()).hexdigest()
