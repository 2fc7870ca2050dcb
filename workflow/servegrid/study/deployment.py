"""Deployments: what one engine start serves. Pure: reads and writes no files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Self

from servegrid.errors import ConfigError
from servegrid.study.endpoint import Api, ExternalEndpoint, check_extras
from servegrid.study.parallelism import DATA, Parallelism, read_parallelism

EMULATED = "emulated"
"""The engine that needs no hardware and no model."""
VLLM = "vllm"
LLAMACPP = "llamacpp"
EXTERNAL = "external"
"""The engine of an endpoint that somebody else has started."""
REPLICAS = "replicas"
_REPLICA_ARGUMENTS = {VLLM: DATA, EMULATED: REPLICAS}
"""The argument of each engine that can serve several copies of a model behind one endpoint."""
CPU = "cpu"
"""The kind of a node without GPUs."""
GPU_MEMORY_UTILIZATION = 0.90
"""The share of a GPU's memory that vLLM uses, unless `engine_args` has another one."""


@dataclass(frozen=True)
class Deployment:
    """What one engine start serves: model × quantization × GPU kind × GPU count × arguments.

    For the engine `external`, the user states all of this and the `endpoint`; servegrid cannot
    check it. `checkpoint` is then empty.
    """

    name: str
    model: str
    checkpoint: str
    tokenizer: str
    quantization: str
    engine: str
    gpu: str
    gpu_count: int
    max_model_len: int
    max_num_seqs: int
    engine_args: Mapping[str, Any] = field(default_factory=dict)
    endpoint: ExternalEndpoint | None = None
    network: str | None = None
    """The network that it must use between several nodes; None if any will do."""
    api: Api = "completions"
    """The API of an engine that servegrid starts; an endpoint has its own."""
    chat_template: str | None = None
    """The file of the chat template; None for the model's own."""
    lora: Mapping[str, str] = field(default_factory=dict)
    """The folders of LoRA adapters, by the names that requests use in turn."""

    @property
    def spec(self) -> dict[str, Any]:
        """All fields as plain JSON data, without those that were added later and are not set."""
        return dict(self._spec)

    # Kept, because Snakemake asks for them once per trial.
    @cached_property
    def _spec(self) -> dict[str, Any]:
        spec = asdict(self)
        if self.endpoint is None:
            del spec["endpoint"]
        else:
            spec["endpoint"] = self.endpoint.spec
        for key, default in _LATER:
            if spec[key] == default:
                del spec[key]
        return spec

    @classmethod
    def from_spec(cls, spec: Mapping[str, Any]) -> Self:
        """The inverse of `spec`."""
        endpoint = spec.get("endpoint")
        return cls(
            **{**spec, "endpoint": None if endpoint is None else ExternalEndpoint(**endpoint)}
        )

    @cached_property
    def digest(self) -> str:
        """The digest of `spec`."""
        return digest_json(self.spec)

    @property
    def output_len_exact(self) -> bool:
        """Whether every response must have exactly as many tokens as it was asked for."""
        return self.endpoint is None or self.endpoint.output_len_exact

    @property
    def is_chat(self) -> bool:
        """Whether it is asked through the chat API, so that prompts are texts."""
        return (self.api if self.endpoint is None else self.endpoint.api) == "chat"

    @property
    def environment(self) -> str:
        """The Python environment of its jobs: of the main process, or of the kind of node."""
        return "main" if self.engine in (EMULATED, EXTERNAL) else "kind"

    @property
    def node_kind(self) -> str:
        """The kind of node for its allocations. For `external`, only the load client runs there."""
        return CPU if self.engine == EXTERNAL else self.gpu

    @property
    def node_gpus(self) -> int:
        """The number of GPUs for its allocations."""
        return 0 if self.engine == EXTERNAL else self.gpu_count

    @property
    def parallelism(self) -> Parallelism:
        """How its GPUs work together. Raises ConfigError if its `engine_args` contradict them."""
        if self.engine == VLLM:
            return read_parallelism(self.engine_args, self.gpu_count, f"deployment `{self.name}`")
        given = self.engine_args.get(REPLICAS) if self.engine == EMULATED else None
        replicas = given if isinstance(given, int) and given > 0 else 1  # a record can say anything
        return Parallelism(tensor=max(1, self.gpu_count // replicas), data=replicas)

    @property
    def replicas(self) -> int:
        """The copies of the model behind its endpoint, among which it divides the requests."""
        return self.parallelism.data

    @property
    def max_running(self) -> int:
        """The most requests that it runs at once: vLLM applies `max_num_seqs` to each replica."""
        return self.max_num_seqs * self.replicas


_LATER: tuple[tuple[str, Any], ...] = (
    ("network", None),
    ("api", "completions"),
    ("chat_template", None),
    ("lora", {}),
)
"""Keys of a specification that it has only with another value than this: older cells stay."""


def canonical_json(data: Any) -> str:
    """JSON with sorted keys and no spaces: equal data gives equal text on every machine."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest_json(data: Any) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the canonical JSON."""
    return digest_text(canonical_json(data))


def digest_text(text: str) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def parse_deployment(entry: Mapping[str, Any], where: str) -> Deployment:
    """The deployment of an entry that matches the schema. Errors name its place `where`.

    Raises ConfigError if gpu_count does not match the kind of GPU, the replicas or vLLM's parallel
    sizes, if the engine cannot serve several replicas, if the entry has only one of `engine:
    external` and `endpoint`, or if the weights or the tokenizer are missing.
    """
    on_cpu = entry["gpu"] == CPU
    replicas = entry.get(REPLICAS, 1)
    gpu_count = entry.get("gpu_count", 0 if on_cpu else replicas)
    if on_cpu != (gpu_count == 0):
        raise ConfigError(
            f"{where}.gpu_count: {gpu_count} is not valid with gpu `{entry['gpu']}`. "
            "Use 0 for `cpu` and at least 1 for every other kind."
        )
    external = entry["engine"] == EXTERNAL
    if "network" in entry and (on_cpu or entry["engine"] not in (VLLM, EMULATED)):
        raise ConfigError(
            f"{where}.network: only vLLM on GPUs uses InfiniBand between nodes. Remove the key."
        )
    (_check_external_keys if external else _check_managed_keys)(entry, where)
    _check_served_keys(entry, where)
    _check_replicas(entry, gpu_count, where)
    arguments = entry.get("engine_args", {})
    if replicas > 1:
        arguments = {**arguments, _REPLICA_ARGUMENTS[entry["engine"]]: replicas}
    if entry["engine"] == VLLM:
        read_parallelism(arguments, gpu_count, where)
    endpoint = ExternalEndpoint(**entry["endpoint"]) if external else None
    gpus = CPU if on_cpu else f"{gpu_count}x{entry['gpu']}"
    engine = f"{EXTERNAL}-{endpoint.engine}" if endpoint else entry["engine"]
    parts = [entry["model"], entry["quantization"], engine, gpus]
    parts += [f"{REPLICAS}-{replicas}"] if replicas > 1 else []
    return Deployment(
        name=entry.get("name", "_".join(parts)),
        model=entry["model"],
        checkpoint=entry.get("checkpoint", ""),
        tokenizer=entry["tokenizer"] if "tokenizer" in entry else entry["checkpoint"],
        quantization=entry["quantization"],
        engine=entry["engine"],
        gpu=entry["gpu"],
        gpu_count=gpu_count,
        max_model_len=entry["max_model_len"],
        max_num_seqs=entry.get("max_num_seqs", 256),
        engine_args=arguments,
        endpoint=endpoint,
        network=entry.get("network"),
        api=entry.get("api", "completions"),
        chat_template=entry.get("chat_template"),
        lora=entry.get("lora", {}),
    )


def _check_managed_keys(entry: Mapping[str, Any], where: str) -> None:
    if "checkpoint" not in entry:
        raise ConfigError(
            f"{where}: `checkpoint` is missing. "
            f"Name the weights that the engine `{entry['engine']}` loads."
        )
    if "endpoint" in entry:
        raise ConfigError(
            f"{where}.endpoint: servegrid starts the engine `{entry['engine']}` itself. Remove the "
            f"key, or write `engine: {EXTERNAL}` to benchmark a server that already runs."
        )


_SERVED_KEYS = {
    "api": (
        (VLLM, LLAMACPP),
        "Remove the key; for a server that already runs, write `endpoint.api`.",
    ),
    "chat_template": (
        (VLLM, LLAMACPP),
        "Remove the key; a server that already runs has its template.",
    ),
    "lora": (
        (VLLM,),
        "Remove the key; for a server that already runs, name the adapter as `endpoint.model`.",
    ),
}
"""Which engines have these keys, and what to do for others."""


def _check_served_keys(entry: Mapping[str, Any], where: str) -> None:
    """Raise ConfigError if the engine cannot serve as `api`, `chat_template` and `lora` say."""
    engine = entry["engine"]
    for key, (engines, remedy) in _SERVED_KEYS.items():
        if key in entry and engine not in engines:
            raise ConfigError(f"{where}.{key}: not for the engine `{engine}`. {remedy}")
    if "chat_template" in entry and entry.get("api") != "chat":
        raise ConfigError(
            f"{where}.chat_template: only chats have a template, and completions have none. "
            "Add `api: chat`, or remove the key."
        )
    if entry["model"] in entry.get("lora", {}):
        raise ConfigError(
            f"{where}.lora: `{entry['model']}` is the name of the model. Rename the adapter."
        )


def _check_replicas(entry: Mapping[str, Any], gpu_count: int, where: str) -> None:
    engine, replicas = entry["engine"], entry.get(REPLICAS, 1)
    argument = _REPLICA_ARGUMENTS.get(engine)
    given = {key.replace("-", "_") for key in entry.get("engine_args", {})}
    if argument in given and (REPLICAS in entry or engine == EMULATED):
        raise ConfigError(
            f"{where}: engine_args.{argument} is set by the deployment's own key `{REPLICAS}`. Set "
            "that key and remove the argument."
        )
    if replicas == 1:
        return
    if argument is None:
        known = " and ".join(f"`{each}`" for each in _REPLICA_ARGUMENTS)
        remedy = (
            "give `gpu_count` and `max_num_seqs` of all replicas of the server"
            if engine == EXTERNAL
            else "measure one replica; the capacity plan says how many you need"
        )
        raise ConfigError(
            f"{where}.{REPLICAS}: only {known} serve several replicas behind one endpoint, "
            f"`{engine}` does not. Remove the key, and {remedy}."
        )
    if gpu_count % replicas:
        raise ConfigError(
            f"{where}.gpu_count: {gpu_count} GPUs cannot be divided evenly among {replicas} "
            f"replicas. `gpu_count` counts the GPUs of all replicas: set it to {replicas} times "
            "those of one."
        )


def _check_external_keys(entry: Mapping[str, Any], where: str) -> None:
    for key, purpose in (
        ("endpoint", "the address of the server"),
        ("tokenizer", "a folder with the model's tokenizer.json, which sets the prompt lengths"),
        ("max_num_seqs", "the maximum number of requests that the server runs at once"),
    ):
        if key not in entry:
            raise ConfigError(
                f"{where}: the engine `{EXTERNAL}` needs `{key}`. Add the key: {purpose}."
            )
    endpoint = entry["endpoint"]
    try:
        check_extras(endpoint.get("extra_body", {}), endpoint.get("extra_headers", {}))
    except ConfigError as error:
        raise ConfigError(f"{where}.endpoint.{error}") from None
    for key in ("checkpoint", "engine_args"):
        if key in entry:
            raise ConfigError(
                f"{where}.{key}: the engine `{EXTERNAL}` does not use this key, because servegrid "
                "starts no engine. Remove the key."
            )
