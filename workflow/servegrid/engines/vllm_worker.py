"""Asks vLLM's worker processes which attention backends and which network they really use."""

from __future__ import annotations

from typing import Any


class WorkerExtension:
    """vLLM mixes this into its worker class (`--worker-extension-cls`)."""

    def servegrid_attention_backends(self) -> list[str]:
        """The sorted names of the attention backends of the model's layers."""
        runner = self.model_runner  # type: ignore[attr-defined]
        if hasattr(runner, "attn_groups"):
            backends = {group.backend for groups in runner.attn_groups for group in groups}
        else:
            backends = {runner.attn_backend}
        return sorted(backend.get_name() for backend in backends)

    def servegrid_network(self) -> dict[str, Any] | None:
        """See `network.observe`. None if it cannot be seen: an error here would break the engine's
        next call."""
        try:
            from torch.distributed import get_backend

            from servegrid.engines.network import observe

            return observe(get_backend())
        except Exception as error:
            print(f"servegrid: this worker's network is not known: {error!r}", flush=True)
            return None
