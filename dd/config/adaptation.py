"""The arguments of train.py stage=adapter."""

from typing import Any

from dd.config.identity import trainer_identity
from dd.config.objects import device, instantiate, plain, settings
from dd.config.tuning import one_device


def adaptation(cfg: Any) -> dict[str, Any]:
    """Arguments of :func:`dd.stages.train_adapter.train_adapter` except folder and trainer.
    ValueError for a stage without its settings, several devices, or a generator with an adapter or
    another precision than float32."""
    from dd.stages.train_adapter import AdapterSettings  # imports diffusers, so only if needed

    if cfg.get("adapter") is None:
        raise ValueError(
            "stage=adapter needs its settings: experiment=shapes_adapt_generator or "
            "sd_adapt_generator"
        )
    one_device(cfg, "an adapter is trained on one device")
    given = plain(cfg.adapter)
    node = {"dtype": "float32", **given.pop("generator")}
    if node["dtype"] != "float32" or node.get("adapter"):
        raise ValueError(
            "adapter.generator: trained from float32 weights without an adapter (trainer.precision "
            f"chooses the arithmetic); got dtype={node['dtype']}, adapter={node.get('adapter')}"
        )
    return {
        "settings": AdapterSettings(
            listed=given.pop("list"), batch_size=cfg.batch_size, **settings(given)
        ),
        "generator": instantiate(node, device=device(cfg)),
        "num_workers": cfg.num_workers,
        "seed": cfg.seed,
        "trained_with": trainer_identity(cfg),
    }
