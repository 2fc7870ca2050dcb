"""The shape of a model from its checkpoint: config.json and the sizes of its files.

Sources of the keys: the configurations of transformers (Llama, Mixtral, Qwen, Gemma, DeepSeek and
gpt-oss). What a configuration does not say is not guessed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from servegrid.errors import ConfigError, ModelError
from servegrid.reference.roofline import ModelShape, kv_scale, model_shape
from servegrid.study import models
from servegrid.study.deployment import EMULATED, EXTERNAL, Deployment


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a deployment's model: its shape, and its config.json (empty if unknown).

    `source` says where the shape comes from. If `shape` is None, `unknown` says why.
    """

    shape: ModelShape | None
    source: str
    config: Mapping[str, Any] = field(default_factory=dict)
    unknown: str | None = None


TABLE = "the table of models"


def find_model(
    deployment: Deployment, folder: Path, revisions: Mapping[str, str] | None = None
) -> ModelFacts:
    """The model of a deployment: from its checkpoint if that is here, else from the table.

    `folder` and `revisions` are those of `study.models.locate`. Raises ModelError if the
    checkpoint's config.json is damaged.
    """
    path = _find_checkpoint(deployment, folder, revisions)
    if path is not None and path.is_dir() and (path / "config.json").exists():
        config, size = read_config(path), weight_bytes(path)
        shape = shape_from_config(config, _loaded_bytes(deployment, config, size or 0))
        if size and shape is not None:
            factor = 2.0 if _dtype(deployment) == FLOAT32 else kv_scale(deployment)
            return ModelFacts(scale_kv(shape, factor), str(path), config)
    try:
        shape = model_shape(deployment)
    except ConfigError as error:
        hint = " Or fetch the checkpoint: then its config.json is read." if path is None else ""
        return ModelFacts(None, TABLE, unknown=f"{error}{hint}")
    if path is not None and path.is_file():
        return ModelFacts(replace(shape, weight_bytes=path.stat().st_size), f"{TABLE} and {path}")
    return ModelFacts(shape, TABLE)


def known_model(deployment: Deployment) -> ModelFacts:
    """The model of a deployment from the table alone: the same on every machine."""
    try:
        return ModelFacts(model_shape(deployment), TABLE)
    except ConfigError as error:
        return ModelFacts(None, TABLE, unknown=str(error))


FLOAT32 = "float32"


def _find_checkpoint(
    deployment: Deployment, folder: Path, revisions: Mapping[str, str] | None
) -> Path | None:
    if deployment.engine in (EMULATED, EXTERNAL):
        return None
    try:
        return models.locate(deployment.checkpoint, folder, revisions)
    except ModelError:
        return None


def _dtype(deployment: Deployment) -> str:
    return str(deployment.engine_args.get("dtype") or "auto").lower()


def _loaded_bytes(deployment: Deployment, config: Mapping[str, Any], size: int) -> float:
    """The weights in memory: vLLM loads 32 bits as 16 and the reverse, if `dtype` says so."""
    if quantization_method(config):
        return size
    stored = str(config.get("dtype") or config.get("torch_dtype") or "")
    if stored == FLOAT32:
        return size if _dtype(deployment) == FLOAT32 else size / 2
    return size * 2 if stored and _dtype(deployment) == FLOAT32 else size


def weight_bytes(checkpoint: Path) -> int | None:
    """The size of the weights that vLLM loads from a folder; None if there are none.

    Mistral's `consolidated` files are not counted: they contain the same weights again.
    """
    index = checkpoint / "model.safetensors.index.json"
    if index.exists():
        names = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
        files = [checkpoint / name for name in names]
    else:
        found = list(checkpoint.glob("*.safetensors"))
        files = [file for file in found if not file.name.startswith("consolidated")] or found
        files = files or list(checkpoint.glob("pytorch_model*.bin"))
    return sum(file.stat().st_size for file in files if file.exists()) or None


def read_config(checkpoint: Path) -> dict[str, Any]:
    """The config.json of a checkpoint. Raises ModelError if it cannot be read."""
    file = checkpoint / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{file}: cannot be read ({error}). Download the model again, or correct the path."
        ) from error
    if not isinstance(config, dict):
        raise ModelError(f"{file}: is not a mapping of keys. Download the model again.")
    return config


def quantization_method(config: Mapping[str, Any]) -> str | None:
    """The method that config.json names (`awq`, `gptq`, `fp8`); None if there is none."""
    stored = config.get("quantization_config") or config.get("compression_config")
    method = stored.get("quant_method") if isinstance(stored, Mapping) else None
    return str(method).lower() if method else None


def shape_from_config(config: Mapping[str, Any], size: float) -> ModelShape | None:
    """The shape of a model with the configuration `config` and weights of `size` bytes.

    None if the configuration lacks a size that the shape needs. Parameters follow from the sizes of
    the layers: attention, and three matrices per feed-forward network or expert.
    """
    text = config.get("text_config")
    keys = {**config, **(text if isinstance(text, Mapping) else {})}
    needed = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")
    if not all(isinstance(keys.get(key), int) and keys[key] > 0 for key in needed):
        return None
    layers, hidden, heads, vocab = (keys[key] for key in needed)
    tied = bool(keys.get("tie_word_embeddings", False))
    embedding = vocab * hidden
    attention, kv_numbers, kv_heads = _attention(keys, hidden, heads)
    dense, expert, experts, active = _feed_forward(keys, hidden)
    if dense + expert == 0:
        return None
    sparse = layers - _whole(keys, "first_k_dense_replace") if experts > 1 else 0
    tables = embedding * (1 if tied else 2)
    shared = layers * attention + (layers - sparse) * dense + tables
    shared += sparse * _whole(keys, "n_shared_experts") * expert
    window, sliding = _sliding(keys, layers)
    return ModelShape(
        params=shared + sparse * experts * expert,
        active_params=shared + sparse * active * expert,
        embedding_params=embedding,
        experts=experts,
        active_experts=active,
        kv_bytes_per_token=2.0 * layers * kv_numbers,
        weight_bytes=size,
        tied=tied,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        max_context=_whole(keys, "max_position_embeddings"),
        sliding_window=window,
        sliding_layers=sliding,
    )


def scale_kv(shape: ModelShape, factor: float) -> ModelShape:
    """The shape with another size of the numbers in the KV cache."""
    return replace(shape, kv_bytes_per_token=shape.kv_bytes_per_token * factor)


def _attention(keys: Mapping[str, Any], hidden: int, heads: int) -> tuple[int, int, int]:
    """Per layer: parameters of the attention, numbers in the KV cache per token, and KV heads.

    Latent attention (MLA) stores one compressed vector and one rotary key for all heads.
    """
    rank = _whole(keys, "kv_lora_rank")
    if rank:
        rope, nope = _whole(keys, "qk_rope_head_dim"), _whole(keys, "qk_nope_head_dim")
        value = _whole(keys, "v_head_dim")
        query = _whole(keys, "q_lora_rank")
        wide = heads * (nope + rope)
        queries = query * (hidden + wide) if query else hidden * wide
        params = queries + hidden * (rank + rope) + rank * heads * (nope + value)
        return params + heads * value * hidden, rank + rope, 1
    dim = _whole(keys, "head_dim") or hidden // heads
    kv_heads = _whole(keys, "num_key_value_heads") or heads
    return 2 * hidden * dim * (heads + kv_heads), 2 * kv_heads * dim, kv_heads


def _feed_forward(keys: Mapping[str, Any], hidden: int) -> tuple[int, int, int, int]:
    """Parameters of a dense network and of an expert, experts per layer, experts per token."""
    dense = 3 * hidden * _whole(keys, "intermediate_size")
    experts = next(
        (
            count
            for key in ("num_local_experts", "num_experts", "n_routed_experts")
            if (count := _whole(keys, key)) > 1
        ),
        1,
    )
    if experts == 1:
        return dense, 0, 1, 1
    width = _whole(keys, "moe_intermediate_size") or _whole(keys, "intermediate_size")
    active = _whole(keys, "num_experts_per_tok") or _whole(keys, "experts_per_token") or 1
    return dense, 3 * hidden * width, experts, active


def _sliding(keys: Mapping[str, Any], layers: int) -> tuple[int, int]:
    """The sliding window in tokens, and the number of layers that have it."""
    window = _whole(keys, "sliding_window")
    if not window or keys.get("use_sliding_window") is False:
        return 0, 0
    types = keys.get("layer_types")
    if isinstance(types, list):
        return window, sum(each == "sliding_attention" for each in types)
    pattern = _whole(keys, "sliding_window_pattern")
    return window, layers - layers // pattern if pattern else layers


def _whole(keys: Mapping[str, Any], key: str) -> int:
    value = keys.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
