"""What is asked of vLLM's own worker processes: which attention code they really use."""

from __future__ import annotations


class Facts:
    """Mixed into vLLM's worker class by its option `--worker-extension-cls`."""

    def servegrid_attention_backends(self) -> list[str]:
        """Names of the attention backends of the model's layers, sorted."""
        runner = self.model_runner  # type: ignore[attr-defined]
        if hasattr(runner, "attn_groups"):
            backends = {group.backend for groups in runner.attn_groups for group in groups}
        else:
            backends = {runner.attn_backend}
        return sorted(backend.get_name() for backend in backends)
