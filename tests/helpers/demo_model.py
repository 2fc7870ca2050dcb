"""The files of the demo's model, as the fixture `demo_model` gives them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NamedTuple

HEADS, KV_HEADS = 12, 4


class DemoModel(NamedTuple):
    """The demo's model: its cache folder, the folder of safetensors, and the GGUF file."""

    models: Path
    folder: Path
    gguf: Path


def pad_heads(model: Path, folder: Path) -> Path:
    """The model with a fourth group of attention heads, all zeros: the same function.

    Nine heads cannot be divided among two or four workers.
    """
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    size = config["hidden_size"] // config["num_attention_heads"]
    wanted = {"q_proj": (HEADS, 0), "k_proj": (KV_HEADS, 0), "v_proj": (KV_HEADS, 0)}
    wanted["o_proj"] = (HEADS, 1)
    weights = load_file(model / "model.safetensors")
    for name, weight in weights.items():
        for part, (heads, axis) in wanted.items():
            if part in name:
                shape = list(weight.shape)
                shape[axis] = heads * size - shape[axis]
                weights[name] = torch.cat([weight, weight.new_zeros(shape)], axis).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config |= {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": size}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
