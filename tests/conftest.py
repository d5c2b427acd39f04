"""Small fakes that several tests share."""

import importlib
import os
from pathlib import Path

import torch

# Without a GPU Triton's kernels run in its interpreter; asked for before other packages import
# triton.
os.environ["TRITON_INTERPRET"] = str(int(not torch.cuda.is_available()))
# Ray gives its workers way to all other processes; beside other tests they would hardly run.
os.environ.setdefault("RAY_worker_niceness", "0")

import hydra
import numpy as np
import pytest
import pytorch_lightning as pl
import torch.nn.functional as F
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

ROOT = Path(__file__).parent.parent


# the rooms whose tests take seconds
QUICK = ("attention", "masks", "evaluation", "store", "test_layers.py", "test_taxonomy.py")
SLOW = {"full", "browser"}
# The files that take longest. Where several processes share the tests they come first, so that
# none of them is still at work when the others have ended.
LONG = (
    "stages/test_study.py",
    "faults/test_grammar.py",
    "training/test_fitting.py",
    "config/test_conf.py",
    "faults/test_training.py",
    "execution/test_ray.py",
    "stages/test_init.py",
    "training/test_recipes.py",
    "test_chain.py",
    "stages/test_deploy.py",
    "training/test_tracking.py",
)


def pytest_collection_modifyitems(items):
    """The marker ``quick``: tests of the science and of what lies on disk. In one of several
    processes, the order of :data:`LONG`."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = {ROOT / "tests" / name: at for at, name in enumerate(LONG)}
        items.sort(key=lambda item: place.get(item.path, len(LONG)))
    for item in items:
        room = Path(item.path).relative_to(ROOT / "tests").parts[0]
        if room in QUICK and not SLOW & {mark.name for mark in item.iter_markers()}:
            item.add_marker("quick")


class TinySegmenter(torch.nn.Module):
    """What the training asks of a segmenter, in two layers: no dropout, so that a training can
    be made again bit by bit."""

    def __init__(self, num_classes: int = 3, width: int = 4):
        super().__init__()
        convolution = torch.nn.Conv2d(3, width, 3, 2, 1, bias=False)
        self.backbone = torch.nn.Sequential(
            convolution, torch.nn.BatchNorm2d(width), torch.nn.ReLU()
        )
        self.head = torch.nn.Conv2d(width, num_classes, 1)
        self.files = {}

    def forward(self, images):
        logits = self.head(self.backbone(images.float() / 255))
        return F.interpolate(logits, size=images.shape[2:], mode="bilinear")

    def loss(self, images, labels):
        loss = F.cross_entropy(self(images), labels, ignore_index=255)
        return {"decode.loss_ce": loss, "loss": loss}

    def parameter_groups(self, learning_rate, weight_decay, backbone_multiplier):
        return [
            {
                "name": "backbone",
                "params": list(self.backbone.parameters()),
                "lr": learning_rate * backbone_multiplier,
                "weight_decay": weight_decay,
            },
            {
                "name": "heads",
                "params": list(self.head.parameters()),
                "lr": learning_rate,
                "weight_decay": weight_decay,
            },
        ]


class ToyPictures:
    """Images [8, 10, 3] whose brightness is the class, one third of the pixels ignored."""

    def __init__(self, count: int = 7, num_classes: int = 3):
        self.count, self.num_classes = count, num_classes

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        rng = np.random.default_rng([index, 11])
        mask = rng.integers(0, self.num_classes, (4, 5)).repeat(2, 0).repeat(2, 1).astype(np.uint8)
        image = (mask[..., None] * 80 + rng.integers(0, 60, (8, 10, 3))).astype(np.uint8)
        return image, np.where(rng.random(mask.shape) < 0.3, 255, mask).astype(np.uint8)


def toy_train(image, mask, seed):
    """A 'transform' whose result depends on the seed: a shift of brightness."""
    shifted = image.astype(np.float32) + np.random.default_rng(seed).integers(0, 20)
    return torch.from_numpy(shifted.transpose(2, 0, 1)), torch.from_numpy(mask.astype(np.int64))


def toy_eval(image):
    return torch.from_numpy(image.transpose(2, 0, 1).copy())


def quiet_trainer(folder, max_steps, callbacks=(), **kwargs):
    """Lightning's trainer on one CPU core, without files and lines of its own."""
    return pl.Trainer(
        max_steps=max_steps,
        max_epochs=-1,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        **{
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 0,
            "limit_val_batches": 0,
            **kwargs,
        },
    )


@pytest.fixture
def tiny_segmenter():
    """``make(num_classes=3, width=4, seed=0)``: a fresh :class:`TinySegmenter`."""

    def make(num_classes=3, width=4, seed=0):
        torch.manual_seed(seed)
        return TinySegmenter(num_classes, width)

    return make


DEEPLAB = {
    "_target_": "dd.segmenters.deeplabv3.DeepLabV3",
    "depth": 18,
    "base_channels": 8,
    "dilations": [1, 2, 3],
}


@pytest.fixture(scope="session")
def finished_run():
    """``make(folder, node=DEEPLAB, names=("cat", "dog"), seed=0, scale=32)``: a finished run of
    a tiny segmenter that sees every class somewhere; returns (folder, run.json, the segmenter)."""
    from dd import config
    from dd.store import checkpoints
    from dd.store.provenance import write_json

    def make(folder, node=None, names=("cat", "dog"), seed=0, scale=32):
        run = {
            "segmenter": node or DEEPLAB,
            "taxonomy": {"name": "pets", "names": list(names)},
            "scale": scale,
            "bf16": False,
            "supervision": "A",
            "trained_on": {"source": "synthetic"},
        }
        torch.manual_seed(seed)
        segmenter = config.segmenter_of(run).eval()
        if "decode_head" in dict(
            segmenter.named_children()
        ):  # as if trained: far from an equal score of all classes
            torch.nn.init.normal_(segmenter.decode_head.conv_seg.weight, std=5)
        checkpoint = folder / "checkpoints/last.ckpt"
        checkpoint.parent.mkdir(parents=True)
        checkpoints.save(
            {"state_dict": {f"segmenter.{k}": v for k, v in segmenter.state_dict().items()}},
            checkpoint,
        )
        run["weights_sha256"] = checkpoints.weights_sha256(segmenter.state_dict())
        write_json(folder / "run.json", run)
        return folder, run, segmenter

    return make


@pytest.fixture
def toy_data():
    """``make(count=7, tune=None, batch_size=2, seed=0)``: a data module on :class:`ToyPictures`."""
    from dd.training.datamodule import SegmentationData

    def make(count=7, tune=None, batch_size=2, seed=0):
        validation = None if tune is None else ToyPictures(tune)
        return SegmentationData(
            ToyPictures(count), validation, toy_train, toy_eval, batch_size, 0, seed
        )

    return make


@pytest.fixture(scope="session")
def make_trainer():
    return quiet_trainer


class WebFiles:
    """What a local server holds and how it behaves: ``files`` {path: bytes}, ``cuts`` = bytes
    after which it hangs up."""

    def __init__(self):
        self.files, self.cuts, self.asked, self.ranges, self.etag, self.status = (
            {},
            [],
            [],
            True,
            '"1"',
            None,
        )
        self.address = None

    def url(self, path):
        return f"{self.address}/{path}"


@pytest.fixture
def web():
    """A web server on this machine: :class:`WebFiles` with ETag, Range and If-Range."""
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    files = WebFiles()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers.get("Range")
            files.asked.append((self.path, wanted))
            data = files.files.get(self.path.lstrip("/"))
            if data is None or files.status:
                return self.send_error(files.status or 404)
            begin = 0
            if files.ranges and wanted and self.headers.get("If-Range", files.etag) == files.etag:
                begin = int(wanted.removeprefix("bytes=").rstrip("-"))
            if begin and begin >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206 if begin else 200)
            if begin:
                self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - begin))
            if files.etag:
                self.send_header("ETag", files.etag)
            self.end_headers()
            self.wfile.write(
                data[begin : begin + files.cuts.pop(0)] if files.cuts else data[begin:]
            )

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    files.address = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield files
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="session")
def run():
    """``run(command, *overrides)``: a root script in this process, with its configuration
    composed as on the command line."""

    def run(command: str, *overrides: str):
        door = importlib.import_module(f"dd.cli.{command}").DOOR
        GlobalHydra.instance().clear()
        with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = hydra.compose(command, overrides=list(overrides))
        OmegaConf.set_struct(cfg, True)
        return door.run(cfg)

    return run


@pytest.fixture(scope="session")
def tiny_blip():
    """``make(folder, seed=0)``: a BLIP in the format of the hub (safetensors), tiny, random
    weights. It speaks in nouns."""

    def make(folder, seed=0):
        from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration
        from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

        words = [
            "[PAD]",
            "[UNK]",
            "[CLS]",
            "[SEP]",
            "[MASK]",
            "[DEC]",
            "dog",
            "cat",
            "man",
            "sofa",
            "bus",
            "horse",
            "bird",
        ]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.txt").write_text("\n".join(words) + "\n")
        BertTokenizer.from_pretrained(folder).save_pretrained(folder)
        sizes = {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        text = {
            **sizes,
            "vocab_size": len(words),
            "bos_token_id": 5,
            "pad_token_id": 0,
            "eos_token_id": 3,
            "sep_token_id": 3,
            "max_position_embeddings": 40,
            "encoder_hidden_size": 16,
        }
        torch.manual_seed(seed)
        vision = {**sizes, "image_size": 32, "patch_size": 8}
        model = BlipForConditionalGeneration(
            BlipConfig(text_config=text, vision_config=vision, projection_dim=16)
        )
        for (
            weights
        ) in model.parameters():  # BLIP starts so small that every image gets the same words
            torch.nn.init.normal_(weights, std=0.4)
        torch.nn.init.constant_(model.text_decoder.cls.predictions.bias[:6], -100)
        model.save_pretrained(folder)
        processor = BlipImageProcessorPil(
            size={"height": 32, "width": 32}, image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]
        )
        processor.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_clip():
    """``make(folder, seed=0)``: a CLIP in the format of the hub (safetensors), tiny, random
    weights, 32-px images."""

    def make(folder, seed=0):
        from transformers import CLIPConfig, CLIPModel
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        from dd.generators import train_tokenizer

        folder.mkdir(parents=True, exist_ok=True)
        words = train_tokenizer(
            ["a photo of an apple", "a gold ring and a pine tree"] * 10, 30, folder
        )
        words.save_pretrained(folder)
        sizes = {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        text = {
            **sizes,
            "vocab_size": len(words),
            "max_position_embeddings": 24,
            "bos_token_id": words.bos_token_id,
            "eos_token_id": words.eos_token_id,
            "pad_token_id": words.pad_token_id,
        }
        torch.manual_seed(seed)
        vision = {**sizes, "image_size": 32, "patch_size": 8}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
        for (
            weights
        ) in model.parameters():  # CLIP starts so small that every text gets the same embedding
            torch.nn.init.normal_(weights, std=0.4)
        torch.nn.init.normal_(model.text_model.embeddings.token_embedding.weight, std=2)
        # seed 0 would give every image a negative cosine, a score of 0
        model.visual_projection.weight.data.neg_()
        model.save_pretrained(folder)
        CLIPImageProcessorPil(
            size={"shortest_edge": 32},
            crop_size=32,
            image_mean=[0.5, 0.4, 0.3],
            image_std=[0.2, 0.3, 0.4],
        ).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def ray_cluster():
    """A Ray of this session on the loopback interface: 2 CPUs that drivers of their own
    processes join. ``.address``."""
    import os

    from dd.execution import ray as adapter

    os.environ.update(adapter.BEFORE_IMPORT | adapter.LOOPBACK | {"RAY_AUTH_MODE": "disabled"})
    os.environ["PYTHONPATH"] = str(ROOT)  # a library ships a package called tests
    from ray.cluster_utils import Cluster

    settings = {"num_cpus": 2, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, connect=False, head_node_args=settings)
    yield cluster
    cluster.shutdown()
