"""Asks vLLM's worker processes which attention backends they really use."""

from __future__ import annotations


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
