"""The files that an engine needs besides the weights: a chat template and LoRA adapters.

Their digests become part of each record, because the study only names their paths.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servegrid.errors import ModelError
from servegrid.study import models
from servegrid.study.deployment import Deployment

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values of vLLM's `max_lora_rank`."""


@dataclass(frozen=True)
class Adapter:
    """The folder of a LoRA adapter as PEFT saves it, and its largest rank."""

    folder: Path
    rank: int


@dataclass(frozen=True)
class Extras:
    """The chat template of a deployment, None for the model's own, and its adapters by name."""

    template: Path | None
    template_text: str
    adapters: Mapping[str, Adapter]

    @property
    def vllm_arguments(self) -> dict[str, Any]:
        """vLLM's arguments for them, to which the deployment's `engine_args` may add."""
        found: dict[str, Any] = {}
        if self.template is not None:
            found["chat_template"] = str(self.template)
        if self.adapters:
            ranks = [adapter.rank for adapter in self.adapters.values()]
            found |= {
                "enable_lora": True,
                "lora_modules": [
                    {"name": name, "path": str(adapter.folder)}
                    for name, adapter in self.adapters.items()
                ],
                "max_loras": len(self.adapters),
                "max_lora_rank": next((each for each in RANKS if each >= max(ranks)), RANKS[-1]),
            }
        return found

    @property
    def facts(self) -> dict[str, Any]:
        """The name, size and SHA-256 of their files, for the record."""
        found: dict[str, Any] = {}
        if self.template is not None:
            found["chat_template"] = models.file_digests(self.template)
        if self.adapters:
            found["lora"] = {
                name: models.file_digests(adapter.folder, weights=True)
                for name, adapter in self.adapters.items()
            }
        return found


def find_extras(deployment: Deployment) -> Extras:
    """The files on this machine. Raises ModelError, which names the key, if one is missing."""
    where = f"deployment `{deployment.name}`"
    template, text = None, ""
    if deployment.chat_template is not None:
        template = _absolute(deployment.chat_template)
        text = _read_template(template, f"{where}: chat_template `{deployment.chat_template}`")
    adapters = {
        name: _find_adapter(path, f"{where}: lora.{name} `{path}`")
        for name, path in deployment.lora.items()
    }
    return Extras(template, text, adapters)


def _read_template(path: Path, where: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelError(
            f"{where}: {path} cannot be read ({error.strerror}). Correct the path."
        ) from None
    except UnicodeDecodeError:
        raise ModelError(
            f"{where}: {path} is no text in UTF-8. Name a template in Jinja."
        ) from None


def _find_adapter(path: str, where: str) -> Adapter:
    folder = _absolute(path)
    config = folder / ADAPTER_CONFIG
    if not config.is_file() or not any((folder / name).is_file() for name in ADAPTER_WEIGHTS):
        raise ModelError(
            f"{where}: {folder} has no LoRA adapter: {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS[0]}. "
            "Name a folder that PEFT has saved; download an adapter of the Hugging Face Hub first."
        )
    try:
        data = json.loads(config.read_text(encoding="utf-8"))
        ranks = [data["r"], *(data.get("rank_pattern") or {}).values()]
        return Adapter(folder, max(operator.index(rank) for rank in ranks))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{where}: {config} has no rank `r` ({error}). Save the adapter with PEFT again."
        ) from None


def _absolute(path: str) -> Path:
    return Path(path).expanduser().absolute()
