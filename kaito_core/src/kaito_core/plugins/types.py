"""What a plugin hands over: small, named, frozen records, and four behaviours with a contract sentence per method.

Records are plain data that anyone can compare, print and store. Behaviours (`NodeProvisioner`, `Tuner`,
`InferenceRuntime`) are abstract classes with few methods. Everything here is light: it imports the standard library and
nothing else, so that a plugin's control side loads in milliseconds.

No ``slots``: they would cost every start of the program a hundredth of a second, and save nothing that counts.

Memory is in bytes, time in seconds, money in US dollars, unless a name says otherwise.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from kaito_core.problems import Problem

if TYPE_CHECKING:
    from kaito_core.kube.kinds import Kind
    from kaito_core.workloads.workload import Workload

API_VERSION = "1.0"
"""The contract between the core and its plugins, apart from any package's version.

A plugin module may say ``KAITO_API_VERSION = "1.0"`` (absent: "1.0"). Another major, or a newer minor than the core's, is
refused with a message; an older minor is accepted."""

_NAME = re.compile(r"[a-z0-9]+([._-][a-z0-9]+)*\Z")


def normalised(name: str) -> str:
    """The form in which names are compared and stored: lower case. ValueError when it cannot be a name."""
    low = name.strip().lower()
    if not _NAME.match(low):
        raise ValueError(
            f"{name!r} is not a name: use letters, digits, '.', '_' and '-', beginning with a letter or digit"
        )
    return low


# --- models -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSource:
    """Where the weights and the tokenizer come from: a hub repository at a pinned revision, files inside a package, or a folder
    on this machine. Exactly one of ``hub``, ``package`` and ``folder`` is given."""

    hub: str = ""
    """``org/name`` on the Hugging Face hub."""
    revision: str = ""
    """The commit that the numbers of the preset were read from; of a folder ``sha256:`` and a digest of what was read."""
    package: str = ""
    """An importable package that ships the files (``kaito_preset_demo``); ``path`` is the folder inside it."""
    path: str = ""
    folder: str = ""
    """A folder of this machine. It means nothing elsewhere: what is handed over never names it."""

    def __post_init__(self) -> None:
        if sum(map(bool, (self.hub, self.package, self.folder))) != 1:
            raise ValueError("a model source is a hub repository, a package or a folder, and exactly one of them")

    def __str__(self) -> str:
        if self.folder:
            return f"the folder {self.folder}"
        return f"{self.hub}@{self.revision[:12]}" if self.hub else f"the package {self.package}"


@dataclass(frozen=True)
class Architecture:
    """The numbers that memory and time are computed from; they agree with the model's ``config.json``."""

    name: str
    """The class in ``config.json``: ``Phi3ForCausalLM``."""
    parameters: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    """Longest sequence, in tokens."""
    linears: Mapping[str, tuple[int, int]]
    """The linear modules of one layer by name, as (in, out) features: what is quantised and what LoRA can target."""
    tied_embeddings: bool = False
    sliding_window: int | None = None
    cache_width: int | None = None
    """Numbers that one layer's cache keeps for a token where that is not 2 × kv_heads × head_dim: latent attention keeps
    kv_lora_rank + qk_rope_head_dim (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    @property
    def cache_numbers(self) -> int:
        """Numbers that the key-value cache of all layers keeps for a token; bytes are these times the precision's size."""
        width = 2 * self.kv_heads * self.head_dim if self.cache_width is None else self.cache_width
        return self.layers * width

    @property
    def linear_parameters(self) -> int:
        """Parameters in the layers' linear modules: the part that 4-bit quantisation shrinks."""
        return self.layers * sum(i * o for i, o in self.linears.values())

    @property
    def other_parameters(self) -> int:
        """Embeddings, output head and norms: the part that stays in 16 or 32 bit."""
        return self.parameters - self.linear_parameters

    def lora_parameters(self, rank: int, targets: Iterable[str]) -> int:
        """``layers × Σ rank × (in + out)`` over the targeted modules (Hu et al., arXiv 2106.09685, section 4.1)."""
        return self.layers * sum(rank * sum(self.linears[t]) for t in targets)


@dataclass(frozen=True)
class ChatFormat:
    """How a conversation becomes text, and where an answer ends."""

    template: str
    """A Jinja chat template. ``{% generation %}…{% endgeneration %}`` marks what the assistant says; without the marks
    the spans are found by rendering the conversation turn by turn. Empty: the one in the model's own tokenizer files."""
    stop_tokens: tuple[str, ...]
    """The tokens that end an answer, the usual one first. Training refuses data in which none of them is ever trained."""


@dataclass(frozen=True)
class Preset:
    """A model that kaito knows: pure data."""

    name: str
    source: ModelSource
    licence: str
    """SPDX identifier, or the licence's own name."""
    architecture: Architecture
    chat: ChatFormat
    lora_targets: tuple[str, ...]
    dtype: str = "bfloat16"
    """The precision of the published weights."""
    description: str = ""
    aliases: tuple[str, ...] = ()
    gated: bool = False
    """Whether the hub asks for a token."""
    tuning: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Defaults per tuning method: overrides of the tuner's own, in the form of ``training_config`` sections."""
    inference: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Defaults per runtime: for ``vllm`` its flags without the dashes (``{"tool-call-parser": "hermes"}``)."""
    quantization: str = ""
    """How the published weights are quantised (``fp8``, ``gptq``, ``awq``, ``mxfp4``); empty when they are not."""
    weights: int = 0
    """Bytes of the published weights where they are not the parameters times the precision."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", normalised(self.name))
        object.__setattr__(self, "aliases", tuple(normalised(a) for a in self.aliases))
        unknown = set(self.lora_targets) - set(self.architecture.linears)
        if unknown:
            raise ValueError(
                f"preset {self.name}: lora_targets {sorted(unknown)} are not linear modules of its architecture"
            )

    @property
    def weights_bytes(self) -> int:
        """Size of the weights as published, in bytes."""
        return self.weights or self.architecture.parameters * (4 if self.dtype == "float32" else 2)


# --- machines ---------------------------------------------------------------------------------------------------------

CapacityType = Literal["on-demand", "spot"]


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    model: str
    memory: int
    """Usable bytes per GPU, not the nominal size."""
    compute_capability: tuple[int, int] | None = None
    vendor: str = "nvidia"

    @property
    def has_bfloat16(self) -> bool:
        """Native bfloat16 began with NVIDIA's compute capability 8.0 (Ampere); AMD's data-centre GPUs have it."""
        return self.vendor != "nvidia" or (self.compute_capability or (0, 0)) >= (8, 0)


@dataclass(frozen=True)
class Price:
    """What an hour costs, who said so and when."""

    per_hour: float
    source: str
    date: str


@dataclass(frozen=True)
class Offer:
    """A machine that can be had: where, what is in it, and what it costs. An unknown price is None, never 0."""

    instance_type: str
    cpus: int
    memory: int
    """Bytes of RAM that a job can use."""
    gpu: Gpu | None = None
    gpus: int = 0
    provisioner: str = ""
    """Who can get it; empty when no installed plugin can."""
    cloud: str = ""
    region: str = ""
    zone: str = ""
    capacity_type: CapacityType = "on-demand"
    price: Price | None = None
    retired: str = ""
    """Why it can no longer be had, in words; empty when it can."""

    @property
    def is_local(self) -> bool:
        """Whether it is this very machine, which costs nothing extra."""
        return self.provisioner == "local"

    @property
    def device_memory(self) -> int:
        """Bytes that one process of the job can use on its device: one GPU's memory, or the RAM where there is none."""
        return self.gpu.memory if self.gpu and self.gpus else self.memory

    def __str__(self) -> str:
        has = f"{self.gpus}×{self.gpu.model}" if self.gpu and self.gpus else f"{self.cpus} CPUs, no GPU"
        return f"{self.instance_type} ({has})"


@dataclass(frozen=True)
class Requirements:
    """What a workspace asks of a machine; empty means anything."""

    instance_types: tuple[str, ...] = ()
    """Only these, the most wanted first."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Of the nodes to use; new nodes get them."""
    count: int = 1
    gpu_model: str = ""
    """As in the catalogue, or the beginning of it: ``A100`` is every A100."""
    gpus: int = 0
    """At least so many per machine."""
    gpu_memory: int = 0
    """At least so many usable bytes per GPU."""
    capacity_types: tuple[CapacityType, ...] = ("on-demand",)
    regions: tuple[str, ...] = ()
    zones: tuple[str, ...] = ()
    max_price_per_hour: float | None = None
    """US dollars for one machine. An offer of unknown price is not below it."""


@dataclass(frozen=True)
class NodeRequest:
    """A wish for machines. ``id`` is deterministic: asking twice with one id buys once."""

    id: str
    offer: Offer
    requirements: Requirements
    tags: Mapping[str, str] = field(default_factory=dict)
    """Who it is for: `kaito_core.api.labels.WORKSPACE` and ``WORKSPACE_NAMESPACE``; with ``NODE_CLASS_NAME`` where the Workspace names
    a node class. New nodes have them as labels, and what is
    bought has them as tags, so that `NodeProvisioner.held` can tell."""
    also: tuple[Offer, ...] = ()
    """Other offers of the same provisioner on which the job runs in just the same way. A provisioner whose cloud can choose may ask
    for all of them at once; any other leaves them alone."""


@dataclass(frozen=True)
class Held:
    """What a provisioner has got and not given back."""

    request_id: str
    tags: Mapping[str, str]
    """As in the request."""
    age: float
    """Seconds since it was asked for."""


@dataclass(frozen=True)
class NodeStatus:
    """What is known of a request now."""

    id: str
    phase: Literal["absent", "pending", "ready", "releasing", "failed"]
    nodes: tuple[str, ...] = ()
    selector: Mapping[str, str] = field(default_factory=dict)
    """Labels that these nodes, and any that take their place, have and no others: what a pod's node affinity asks for."""
    message: str = ""
    failure: ProvisioningError | None = None
    offer: Offer | None = None
    """Which of the offers that were asked for it has become; None: the request's own."""
    asked: tuple[Offer, ...] = ()
    """Those of `NodeRequest.also` that were really asked for: when it has failed, they have too."""


class ProvisioningError(Exception):
    """A machine could not be had; the message is the cloud's own words. The core acts on the type."""


class InsufficientCapacity(ProvisioningError):
    """The cloud has none of it now: the next offer is tried."""


class QuotaExceeded(ProvisioningError):
    """The account may not have (more of) it: the next offer is tried, and the quota is named."""


class NotAuthorized(ProvisioningError):
    """The credentials do not allow it: the job stops."""


class Unsupported(ProvisioningError):
    """The provisioner cannot do what the request asks: the next offer is tried."""


class Transient(ProvisioningError):
    """It may work in a moment: tried again with back-off."""

    def __init__(self, message: str = "", retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds that the cloud asks to wait; None when it says nothing of it."""


@dataclass(frozen=True)
class Watched:
    """A kind of object that a provisioner looks at often. A host that works for long keeps a cache of it, and looks at a Workspace
    again as soon as an object with its labels (`NodeRequest.tags`) changes. It may be missing in the cluster."""

    kind: Kind
    namespace: str = ""
    """Only there; empty: everywhere."""
    fields: str = ""
    """A field selector: only these are kept, and seen by the provisioner."""
    index: str = ""
    """The label that objects are looked up by."""


class Cluster(Protocol):
    """The cluster that a provisioner works for. Nodes, and what `NodeProvisioner.watches` names, come from the host's cache where it
    has one; what was applied through here is seen at once. Everything is a plain dict, and nobody changes it."""

    def get(self, kind: Kind, name: str, namespace: str = "") -> Mapping[str, Any] | None:
        """One object; None when there is none."""

    def list(
        self, kind: Kind, namespace: str = "", labels: Mapping[str, str] | None = None, *, fresh: bool = False
    ) -> Iterable[Mapping[str, Any]]:
        """The objects with these labels; ``fresh``: asked of the API server itself, before something is said to be gone."""

    def apply(self, kind: Kind, obj: Mapping[str, Any]) -> Mapping[str, Any]:
        """Server-side apply: make it so, whether it was there or not."""

    def delete(self, kind: Kind, name: str, namespace: str = "") -> None:
        """Ask for its deletion; nothing happens when it is not there."""


class NodeProvisioner(ABC):
    """Knows which GPU machines exist, gets them and gives them back.

    All methods are idempotent and none waits: they start or look, and the reconciler comes back."""

    name: ClassVar[str]
    holds: ClassVar[bool] = True
    """Whether what it gets has to be given back. If so, the host writes down whom it asks before it asks, and a Workspace is not
    let go before `release` says ``absent``."""
    patience: ClassVar[float] = 1800.0
    """Seconds that a request may be ``pending`` before it is given up and the next offer is tried."""

    watches: ClassVar[tuple[Watched, ...]] = ()
    """What it looks at in the cluster besides Nodes, time and again."""

    def attach(self, cluster: Cluster) -> None:  # noqa: B027 – only those that need a cluster say so
        """Called once, before anything else, by a host that works on a cluster. Does no I/O."""

    @abstractmethod
    def offers(self, requirements: Requirements) -> Iterable[Offer]:
        """The machines that could be had for these requirements, in no particular order. May read a catalogue; never buys."""

    @abstractmethod
    def ensure(self, request: NodeRequest) -> NodeStatus:
        """Start getting the machines of this request, or look how far it is. Called again after a crash: never buys twice."""

    @abstractmethod
    def observe(self, request_id: str) -> NodeStatus:
        """How far the request is; ``absent`` when nothing of it exists."""

    @abstractmethod
    def release(self, request_id: str) -> NodeStatus:
        """Start giving the machines back; ``absent`` once the cloud says that they are gone."""

    def held(self) -> Iterable[Held]:
        """Everything that it has got for Workspaces of this cluster and not given back, whatever has failed in between. The host
        compares it with what Workspaces want, and releases the rest. Provisioners that hold nothing need not say so."""
        return ()


# --- tuning and serving -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryItem:
    """One part of an estimate, with the formula that made it, for people to check."""

    name: str
    bytes: int
    formula: str = ""


@dataclass(frozen=True)
class MemoryEstimate:
    """The peak that a job will need on one device: an estimate, and marked so wherever it is shown."""

    items: tuple[MemoryItem, ...]

    @property
    def total(self) -> int:
        return sum(i.bytes for i in self.items)


@dataclass(frozen=True)
class DataFacts:
    """What the data doctor found in the training data."""

    rows: int
    tokens: int
    """Tokens of all examples after truncation, prompt and answer together, for one epoch."""
    trained_tokens: int
    """Those that carry loss."""
    longest: int
    """The longest example in tokens, before truncation."""
    sequences: int
    """Sequences of the planned length after packing (or rows, without)."""
    digest: str = ""
    """``sha256:…`` over the input files."""
    format: str = ""
    estimated: bool = False
    """True when the tokens were guessed from the bytes, because no tokenizer was at hand."""


@dataclass(frozen=True)
class Configuration:
    """How a job is laid out on a machine."""

    device: Literal["cuda", "cpu"]
    dtype: str
    """Compute precision: bfloat16, float16 or float32."""
    micro_batch: int
    """Sequences per forward pass."""
    accumulation: int
    """Forward passes per optimizer step."""
    sequence: int
    """Tokens per sequence."""
    processes: int = 1
    """Data-parallel processes, one a GPU."""


@dataclass(frozen=True)
class TuningFit:
    """How a tuning job would run on one machine. It fits when ``memory.total <= capacity``."""

    configuration: Configuration
    memory: MemoryEstimate
    capacity: int
    """Bytes that the job may use on one device of the offer."""
    steps: int | None = None
    """Optimizer steps of the whole job; None while the size of the data is unknown."""
    tokens: int | None = None
    """Tokens of all epochs."""
    seconds: float | None = None
    """Estimated training time; None while the size of the data or the speed of the machine is unknown."""
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.capacity


@dataclass(frozen=True)
class Change:
    """A change to a configuration that makes the job smaller, in words a person can follow."""

    description: str
    method: str
    config: Mapping[str, Any]


class Tuner(ABC):
    """Knows one or several tuning methods. All methods here are pure and light; the training itself is the workload's."""

    name: ClassVar[str]
    methods: ClassVar[tuple[str, ...]]

    @abstractmethod
    def resolve(self, preset: Preset, method: str, user: Mapping[str, Any] | None) -> Mapping[str, Any]:
        """The complete configuration: the user's ``training_config`` sections over the preset's over the tuner's defaults.

        Plain JSON-able data. Raises `UserError` with every problem of ``user`` at once, fields named below
        ``training_config``."""

    @abstractmethod
    def fit(
        self, preset: Preset, method: str, config: Mapping[str, Any], offer: Offer, data: DataFacts | None
    ) -> TuningFit:
        """The best layout of the job on this machine; when none fits, the smallest one, whose ``fits`` is False."""

    @abstractmethod
    def smaller(self, preset: Preset, method: str, config: Mapping[str, Any]) -> Iterable[Change]:
        """Changes that need less memory, the least painful first."""

    @abstractmethod
    def workload(self, job: Any) -> Workload:
        """What is run: the stages that a `kaito_core.workloads.job.TuningJob` needs, in order."""

    @abstractmethod
    def schema(self) -> Mapping[str, Any]:
        """JSON schema of the ``training_config`` file, with a description and the default of every field."""

    def missing(self) -> str:
        """What must be installed before the workload can run on this machine (``pip install …``); empty when nothing."""
        return ""


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter that is served beside its model, under its own name."""

    name: str
    image: str = ""
    """The OCI image that holds it; else it is in ``volume``."""
    volume: Mapping[str, Any] | None = None
    """A Kubernetes volume source, or ``{"hostPath": {"path": FOLDER}}`` on this machine."""
    strength: float = 1.0
    """How much of it is mixed in, from 0 to 1."""


@dataclass(frozen=True)
class ServingConfiguration:
    """How a model is laid out on machines to be served."""

    device: Literal["cuda", "cpu"]
    dtype: str
    """Compute precision: bfloat16, float16 or float32."""
    context: int
    """Longest request in tokens, prompt and answer together."""
    requests: int
    """Requests that are worked on at once; more wait."""
    memory_share: float = 0.9
    """Of one device's memory: what the engine may take."""
    tensor: int = 1
    """GPUs that share every layer."""
    pipeline: int = 1
    """Machines or GPUs that follow one another, each with some of the layers."""
    data: int = 1
    """Copies of the model in one endpoint."""

    @property
    def gpus(self) -> int:
        """GPUs of all machines together; 0 on CPUs."""
        return self.tensor * self.pipeline * self.data if self.device == "cuda" else 0


@dataclass(frozen=True)
class ServingFit:
    """How a model would be served on one kind of machine. It fits when ``memory.total <= capacity``."""

    configuration: ServingConfiguration
    memory: MemoryEstimate
    """Of one device: weights, the cache of ``configuration.context`` tokens at least, adapters, activations, the engine itself."""
    capacity: int
    """Bytes that the engine may use on one device."""
    cache_tokens: int | None = None
    """Tokens that the cache of one copy has room for, all requests together; None when it cannot be said."""
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.capacity


class InferenceRuntime(ABC):
    """Serves a model over HTTP on port 5000, with the face of `kaito_core.serving`. All methods are pure and light; the serving
    itself is the workload's."""

    name: ClassVar[str]
    priority: ClassVar[int] = 0
    """Of several that can serve a model on a machine, the highest is taken unless the user names one."""

    @abstractmethod
    def serves(self, preset: Preset) -> Problem | None:
        """None when this runtime can serve the model, else the reason."""

    @abstractmethod
    def resolve(
        self, preset: Preset, user: Mapping[str, Any] | None, adapters: tuple[ServedAdapter, ...]
    ) -> Mapping[str, Any]:
        """The complete configuration: the user's ``inference_config.yaml`` over the preset's over the runtime's defaults.

        Plain JSON-able data. Raises `UserError` with every problem of ``user`` and of the adapters at once."""

    @abstractmethod
    def fit(
        self,
        preset: Preset,
        config: Mapping[str, Any],
        offer: Offer,
        machines: int,
        adapters: tuple[ServedAdapter, ...],
    ) -> ServingFit:
        """The best layout on so many of these machines; when none fits, the smallest one, whose ``fits`` is False."""

    @abstractmethod
    def workload(self, job: Any) -> Workload:
        """What is run: the stages that a `kaito_core.workloads.serving.ServingJob` needs; the last one serves until it is ended."""

    def missing(self) -> str:
        """What must be installed before the workload can run on this machine (``pip install …``); empty when nothing."""
        return ""


@dataclass(frozen=True)
class Command:
    """One more ``kaito …`` command. ``load`` returns a click command; it is called when the command is used."""

    name: str
    help: str
    load: Callable[[], Any]
