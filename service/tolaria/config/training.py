"""Settings of the training loop: what is trained, where, how fast, and which changes are allowed."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field, JsonValue

from tolaria.config.fields import (
    LIVE,
    METRIC_NAME,
    Milliseconds,
    NodeRange,
    PositiveShare,
    Precision,
    RendezvousAddress,
    Seconds,
    SecondsOrZero,
    Section,
    Share,
)


class ControlSettings(Section):
    """The control loop at step and epoch boundaries."""

    enabled: bool = True
    """Ask a controller, and graft the seeds that it grows. Off: no peer is started or called, and no boundary waits."""

    boundary_budget_ms: Annotated[Milliseconds, LIVE] = 18.0
    """Time that an epoch boundary may delay training. 18: state 3.5, Tamiyo 12, command 1.5, reserve 1."""

    tamiyo_budget_ms: Annotated[Milliseconds, LIVE] = 12.0
    """Tamiyo's share of the boundary. 12: what the state and the command leave. A later answer is applied later."""

    hook_budget_ms: Annotated[Milliseconds, LIVE] = 3.5
    """Time to build and send a request between epochs. 3.5: the same as the state's share of a boundary."""

    max_staleness_steps: int = Field(default=1000, ge=0)
    """Steps after which a late answer is dropped. 1000: a second of small steps, minutes of large ones."""

    step_interval: Annotated[int, LIVE] = Field(default=0, ge=0)
    """Optimizer updates between requests to the controller, one at a time, newest state first. 0: at epochs only."""

    boundary_slack_ms: Annotated[Milliseconds, LIVE] = 4.0
    """Delay of an epoch boundary beyond its budget that is no breach. 4: a busy machine wakes timers late."""

    lr_factor_min: PositiveShare = 0.01
    """Lowest learning rate that the controller may set, as a share of the schedule's. 0.01: training never stops."""

    lr_factor_max: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 10.0
    """Highest learning rate that the controller may set, as a multiple of the schedule's. 10: more diverges."""


class TrainingSettings(Section):
    """The training job."""

    job: str = Field(default="digits", min_length=1)
    """Name of an entry point in `tolaria.jobs`, or `package.module:factory`. digits: built in, needs no download."""

    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Passed unchanged to the job's factory, which documents them."""

    experiment: str = "default"
    """Name that the controller sees and groups runs by."""

    run_name: str = Field(default="", max_length=200)
    """Name of the run for people, shown in its status and in exports. Empty: the run has its id only."""

    tags: dict[str, str] = Field(default_factory=dict)
    """Words about the run by name, shown beside its name."""

    init_from: str = Field(default="", max_length=4096)
    """Where a new run's model gets its first values: an export, a checkpoint's directory, or a state directory.

    A run that is resumed has its own values. Empty: those that the job's build_model gives it.
    """

    epochs: int = Field(default=20, ge=1, le=10**9)
    """Passes over the data; raising it resumes a finished run. 20: the built-in job exceeds 97 % accuracy by then."""

    steps: int = Field(default=0, ge=0, le=10**12)
    """Optimizer updates after which the run ends, in place of training.epochs; raising it resumes a finished run.

    0: training.epochs ends it.
    """

    evaluate_every_steps: int = Field(default=0, ge=0, le=10**9)
    """Optimizer updates between two evaluations; an epoch is that long then, however long a pass over the data is.

    Needs training.steps. 0: an epoch is a pass over the data, or 1000 updates of data without a length.
    """

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Random seed of initialisation, shuffling and dropout. Fixed: a run that can be repeated can be debugged."""

    deterministic: bool = False
    """Bit-equal repeats: deterministic kernels, boundaries that wait for Tamiyo until its timeout. Off: slower."""

    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$")
    """auto: the first accelerator, or the CPU if there is none."""

    accumulate: int = Field(default=1, ge=1, le=10**6)
    """Microbatches per optimizer update. 1: no accumulation."""

    clip_norm: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Maximum total gradient norm; larger gradients are scaled down. 0: off, as the job may clip gradients itself."""

    threads: int = Field(default=0, ge=0, le=1024)
    """CPU threads of torch. 0: one fewer than the cores, at least 1, so that RPCs have a core."""


class OptimizerSettings(Section):
    """Learning rates and optimizer rebuilds. Schedules count optimizer updates of the whole run."""

    policy: Literal["constant", "cosine", "step"] = "constant"
    """Schedule of the host's learning rate. constant: the rate of the job's optimizer."""

    period_steps: int = Field(default=0, ge=0)
    """Period of cosine, or updates between two decays of step. 0, for cosine: the rest of the run."""

    floor: Share = 0.0
    """Lowest factor that the policy reaches. 0: cosine anneals to zero."""

    decay: PositiveShare = 0.1
    """Factor of each decay of step. 0.1: the usual value."""

    after_period: Literal["hold", "restart"] = "hold"
    """What cosine does after its period. hold: an extended run has no jump in its learning rate."""

    warmup_steps: int = Field(default=0, ge=0)
    """Updates of linear warm-up. 0: none, as small models need none."""

    warmup_floor: Share = 0.0
    """Factor at the start of the warm-up. 0: the usual value."""

    weight_decay_policy: Literal["constant", "linear", "cosine"] = "constant"
    """Schedule of the weight decay over the run, from that of the job's groups. constant: the job's."""

    weight_decay_final: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Factor of the job's weight decay at the end of linear and cosine. 0: none is left; above 1 it grows."""

    seed_factor: PositiveShare = 0.1
    """A seed's learning rate as a share of the host's. 0.1: the seed joins a host that is already trained."""

    seed_warmup_steps: int = Field(default=100, ge=0)
    """Updates of a seed's warm-up. 100: its optimizer moments settle before large updates."""

    seed_warmup_floor: Share = 0.1
    """Factor at the start of a seed's warm-up. 0.1: the seed learns from its first step."""

    lr_floor: Annotated[float, Field(ge=0, le=1)] = 1e-8
    """Lower bound of learning rates for adjustments. 1e-8: a lower rate has no effect."""

    lr_ceiling: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10.0
    """Upper bound of learning rates for adjustments. 10: a higher rate is a typing error."""

    rebuild_min_interval_steps: int = Field(default=10, ge=0)
    """Minimum updates between two rebuilds. 10: a faulty controller cannot keep the lane busy with rebuilds."""


_END_S: Final = 10.0
"""Seconds in which an agent that knows that a rank has gone ends the others."""


class LaneSettings(Section):
    """The lane, which computes: in which process it runs, and how often it is started again."""

    mode: Literal["thread", "process", "torchrun"] = "process"
    """process: in a child process, so that what kills it does not end the service; on Linux. thread: for debugging.

    torchrun: in lane.processes child processes, the ranks of a group, which train one model on shares of each batch.
    """

    processes: int = Field(default=1, ge=1, le=256)
    """Ranks in mode torchrun on this machine, each with a device of its kind: the CPU, or one GPU each."""

    nodes: NodeRange = "1:1"
    """Machines of a group in mode torchrun, this one included, as MIN:MAX or one number. 1:1: this machine alone.

    Others run `tolaria lane join`. Training waits for MIN of them, and goes on without those that are lost beyond MIN.
    """

    rendezvous: RendezvousAddress = "127.0.0.1:29400"
    """Address that other machines join at, if lane.nodes allows any. Loopback: reached by nothing else, so change it.

    Who joins proves to have lane.secret_file, but what the ranks then exchange, on other ports too, is neither
    authenticated nor encrypted: use an address in a private network only. 29400: the port that torchrun uses.
    """

    secret_file: str = ""
    """File with the secret that machines share, at least 16 bytes; needed with several. Empty: there is one machine."""

    node_timeout_s: Annotated[float, Field(ge=1, le=3600, allow_inf_nan=False)] = 20.0
    """Silence after which a machine, or the service, counts as lost. 20: TCP is over a cut of 5 or 10 s by then."""

    join_wait_s: SecondsOrZero = 30.0
    """Time that a start with MIN machines waits for more of them. 30: a restarted pod, or a repaired link, is back."""

    grow: Literal["restart", "epoch"] = "restart"
    """When a machine that comes later, or again, is taken into the group. restart: when it starts again anyway.

    epoch: at the end of an epoch the group is started again for it, from its newest proven state, within lane.nodes.
    restart: a sound run is not disturbed.
    """

    parallel: Literal["ddp", "fsdp"] = "ddp"
    """What the ranks of mode torchrun share. ddp: each has the whole model. fsdp: each has a part of every parameter,
    of its gradient and of its optimizer state, by PyTorch's fully_shard, for models that do not fit one device.
    """

    restarts_max: Annotated[int, LIVE] = Field(default=10, ge=0, le=1000)
    """Times within lane.restarts_within_s that a lane which died is started again; then the run fails."""

    restarts_within_s: Annotated[Seconds, LIVE] = 3600.0
    """Time over which deaths are counted. 3600: ten deaths in an hour are no accident."""

    restart_pause_s: Seconds = 0.1
    """Pause before a restart; it doubles with each further one of a lane that lives less than a minute."""

    restart_pause_max_s: Seconds = 60.0
    """Longest pause. 60: a full device or a missing mount may come back."""

    spare_after_s: SecondsOrZero = 30.0
    """Time since a lane was built after which another process imports PyTorch, to replace it if it dies. 0: never.

    It saves most of a restart, and takes some 250 MB for each process. There is none with several machines, if less
    than 2 GiB are left for each rank, or where all processes of a container are killed for the memory of one. 30: a job
    that fails, fails before.
    """

    @property
    def nodes_min(self) -> int:
        """Fewest machines that train."""
        return int(self.nodes.partition(":")[0])

    @property
    def nodes_max(self) -> int:
        """Most machines that train."""
        return int(self.nodes.partition(":")[2])

    @property
    def orphaned_s(self) -> float:
        """Seconds in which ranks that miss another one are ended by their agent.

        It knows the cause, or learns within `node_timeout_s` that a machine is lost.
        """
        return self.node_timeout_s + _END_S


class EmaSettings(Section):
    """An exponential moving average of the weights, which is evaluated and exported beside the model."""

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the average that each update keeps, such as 0.999. 0: no average, which costs the memory of the weights.

    As torch.optim.swa_utils.AveragedModel with get_ema_multi_avg_fn.
    """

    buffers: Literal["copy", "average"] = "copy"
    """Buffers, such as the statistics of BatchNorm, beside the averages. copy: the model's, as AveragedModel has them.

    average: those of floating point are averaged too, as AveragedModel does with use_buffers.
    """

    evaluate: bool = True
    """Evaluate the average after the model, as the figures ema/loss and so on. On: an average is there to be used."""


class EarlyStoppingSettings(Section):
    """Ends a run whose evaluations do not get better any more."""

    metric: str = Field(default="", pattern=rf"^({METRIC_NAME})?$")
    """Figure of evaluations that has to get better: loss, accuracy, a metric of the job, ema/loss. Empty: none."""

    mode: Literal["auto", "min", "max"] = "auto"
    """Whether lower or higher values are better. auto: lower losses, higher accuracies; no others."""

    patience: Annotated[int, Field(ge=1, le=10**6)] = 3
    """Evaluations in a row that are not better, with which the run ends. 3: one may be noise. Raising it resumes."""

    min_delta: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Least difference by which an evaluation is better. 0: any."""

    @property
    def highest_is_best(self) -> bool:
        """Whether a higher value is better."""
        return self.mode == "max" or (self.mode == "auto" and self.metric.rpartition("/")[2] == "accuracy")

    @property
    def judged_by(self) -> str:
        """The metric and its direction, as in `checkpoint.best`; empty if no evaluation ends the run."""
        return f"{self.metric}:{'max' if self.highest_is_best else 'min'}" if self.metric else ""

    @property
    def to_go_on(self) -> str:
        """What has a run that was stopped early go on."""
        patience = f"a larger early_stopping.patience (it is {self.patience})"
        return f"to go on, set {patience}, another early_stopping.metric (it is {self.metric}) or none"

    def problems(self) -> list[str]:
        """Returns what is wrong with metric and mode together."""
        kind = self.metric.rpartition("/")[2]
        if self.metric and self.mode == "auto" and kind not in {"loss", "accuracy"}:
            return [f"early_stopping.metric is {self.metric}, which needs early_stopping.mode = min or max"]
        if {"loss": "max", "accuracy": "min"}.get(kind) == self.mode:
            return [f"early_stopping.mode is {self.mode}, by which the worst {self.metric} is the best"]
        return []


class FastPathSettings(Section):
    """Fast paths of PyTorch. auto enables one where the device gains by it; `tolaria status` shows what is active."""

    fused: Literal["auto", "off"] = "auto"
    """Fused or foreach optimizer kernels. auto: a fused Adam takes 0.6 to 0.8 of the time of the plain one."""

    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the model. auto: on with CUDA; small models on a CPU do not recover the compile time."""

    amp: Precision = "off"
    """Mixed precision; auto: the best that CUDA supports. off: it changes results, so it is an explicit choice.

    bf16, bf16-mixed, fp16, 16-mixed, no, fp32, 32 and the like, as other trainers spell them, are accepted too.
    """

    tf32: Literal["auto", "off"] = "auto"
    """TF32 matrix products on CUDA. auto: on, unless the run is deterministic."""

    pin_memory: Literal["auto", "off"] = "auto"
    """Pinned memory and non-blocking copies on CUDA. auto: on."""


class SeedsSettings(Section):
    """Seeds, the networks grafted into the host."""

    enabled: bool = True
    """Graft seeds when the controller asks for it. Off: the model stays as the job builds it."""

    active_max: int = Field(default=4, ge=0, le=1000)
    """Seeds that grow at the same time; further ones are refused. 4: each costs a backward pass per step."""

    fossilized_max: int = Field(default=8, ge=0, le=1000)
    """Seeds that may become a permanent part of the model. 8: each makes every step slower."""

    isolation: bool = True
    """Keep gradients of seeds that are not blending from the host. On: a seed affects the host after it has trained."""

    cull_steps: int = Field(default=100, ge=1)
    """Updates over which a culled seed fades out. 100: the host adapts without a jump."""


class GradientsSettings(Section):
    """How gradients of several sources are merged."""

    mode: Literal["seed", "microbatch", "sum"] = "seed"
    """What is aggregated: sources, microbatches, or nothing (a sum). seed: conflicts arise between seeds and host."""

    aggregator: Literal["pcgrad", "upgrad", "dualproj", "mgda", "cagrad", "imtl_g", "aligned_mtl"] = "pcgrad"
    """How conflicts between gradients are resolved; all but pcgrad need tolaria[torchjd], cagrad tolaria[cagrad].

    pcgrad: changes gradients that conflict, and no others.
    """

    attribution: Literal["off", "dataloader", "kasmina"] = "off"
    """Divide the host's gradient among seeds by the batch's seed_ids or Kasmina's weights. off: seeds have own rows."""

    layer_norms_top_k: int = Field(default=0, ge=0, le=1000)
    """Layers with the largest gradient norms exported per seed. 0: none, as each is a time series in Prometheus."""

    compact: Annotated[bool, LIVE] = False
    """One seed_health event per seed and epoch instead of one per exceeded threshold. Off: thresholds are visible."""

    share_jump: Annotated[Share, LIVE] = 0.3
    """Smallest reported change of a seed's gradient share between epochs. 0.3: more than shares usually vary."""

    seed_conflict: Annotated[Share, LIVE] = 0.5
    """Share of the other sources in conflict with a seed from which it is reported. 0.5: it opposes most of them."""

    conflict: Annotated[Annotated[float, Field(ge=0)], LIVE] = 0.75
    """Smallest reported conflict rate over all sources. 0.75: the sources mostly oppose each other."""
