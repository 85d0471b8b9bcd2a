"""The catalogue of metrics. Names, labels and buckets are an API that dashboards and alerts depend on."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    Metric,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.samples import Sample

# Otherwise each counter and histogram has a second series with its creation time.
disable_created_metrics()  # type: ignore[no-untyped-call] # the library does not annotate this function

PREFIX = "tolaria."
STEP_BUCKETS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
CALL_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.012, 0.018, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0)
BOUNDARY_BUCKETS_S = (0.001, 0.002, 0.004, 0.006, 0.009, 0.012, 0.015, 0.018, 0.022, 0.03, 0.05, 0.1, 0.5, 2.0)
ROLLBACK_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 12.0, 30.0)
RECOVERY_BUCKETS_S = (0.5, 1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0)
CHECKPOINT_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


_SHARES: Final = dict.fromkeys(("ratio", "share", "share_delta", "fraction", "accuracy"), "1")
UNITS: Final = {"_seconds": "s", "_ms": "ms", "_bytes": "By"} | _SHARES
"""Units, as UCUM writes them, by how names end, apart from `_total` and `_sum`."""

_SLICE_S, _PAUSE_S = 0.001, 0.0002

_UNTYPED = re.compile(rb"^(# TYPE .+) untyped$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class MetricSpec:
    """The declaration of a metric. `name` is dotted, and as in its samples: a counter's includes `_total`."""

    name: str
    kind: str
    help_text: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def unit(self) -> str:
        """The unit, empty for a number of things."""
        return unit_of(self.name)


class Tally(Gauge):
    """A counter whose name does not end in `_total`, which the client library would append to a counter's name.

    Without a type in OpenMetrics, where every counter ends in `_total`; `with_counters` gives it one in plain text.
    """

    _type = "unknown"

    def inc(self, amount: float = 1) -> None:
        """Increases the value. Raises ValueError for a negative amount."""
        if amount < 0:
            raise ValueError("a tally only goes up")
        super().inc(amount)


def with_counters(text: bytes) -> bytes:
    """Returns Prometheus's text format with every tally, the only metrics without a type, typed as a counter."""
    return _UNTYPED.sub(rb"\1 counter", text)


def escaped(name: str) -> str:
    """Returns the name that a scraper without UTF-8 names gets."""
    return name.replace(".", "_")


def unit_of(name: str) -> str:
    """Returns the unit of a metric or of one of its samples by its name, empty for a number of things."""
    stem = name.removesuffix("_total").removesuffix("_sum")
    return next((unit for suffix, unit in UNITS.items() if stem.endswith(suffix)), "")


def start_at_zero(metric: Counter | Histogram, series: Iterable[tuple[str, ...]]) -> None:
    """Creates the series with these labels, so that a rate over them is right from the first increase on."""
    for labels in series:
        metric.labels(*labels)


class _Pace:
    """Pauses at the end of each slice of time."""

    def __init__(self, pause: Callable[[float], None]) -> None:
        self._pause = pause
        self._began_s = time.perf_counter()

    def keep(self) -> None:
        """Pauses if the slice is over."""
        if time.perf_counter() - self._began_s > _SLICE_S:
            self._pause(_PAUSE_S)
            self._began_s = time.perf_counter()


class _PacedSamples(list[Sample]):
    """Samples that keep a pace while something iterates over them."""

    def __init__(self, samples: Iterable[Sample], pace: _Pace) -> None:
        super().__init__(samples)
        self._pace = pace

    def __iter__(self) -> Iterator[Sample]:
        for sample in super().__iter__():
            yield sample
            self._pace.keep()


class Metrics:
    """All metrics, on one registry. Attributes are named like the metrics, with underscores for dots."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self._catalogue: list[MetricSpec] = []
        self._declare_training()
        self._declare_boundaries()
        self._declare_peers()
        self._declare_gradients()
        self._declare_optimization()
        self._declare_emergency()
        self._declare_rollback()
        self._declare_process()
        self._declare_servers()
        self._declare_telemetry()
        self._declare_tracking()
        self._process: ProcessCollector | None = None

    @property
    def catalogue(self) -> tuple[MetricSpec, ...]:
        """All declared metrics, in the order of their declaration; without those of the process."""
        return tuple(self._catalogue)

    def collected(self, pause: Callable[[float], None] = time.sleep) -> Iterator[Metric]:
        """Yields all metrics, those of the process last, for a thread: it reads files, and pauses every millisecond.

        A thread that computes gives up the interpreter only every 5 ms if another one waits for it, and the event loop,
        which waits at every turn, would be held up each time. The samples of a metric pause in the same way when they
        are iterated over.
        """
        if self._process is None:
            self._process = ProcessCollector(registry=None)
        pace = _Pace(pause)
        for metric in chain(self.registry.collect(), self._process.collect()):
            metric.samples = _PacedSamples(metric.samples, pace)
            yield metric
            pace.keep()

    def _declare_training(self) -> None:
        self.epochs_total = self._tally("epochs.total", "Completed epochs.")
        self.epochs_failed = self._tally("epochs.failed", "Failed epochs.")
        self.training_loss = self._gauge("training.loss", "Mean training loss of the last epoch.")
        self.training_accuracy = self._gauge("training.accuracy", "Validation accuracy of the last epoch, 0 to 1.")
        self.training_latency_ms = self._gauge("training.latency_ms", "Duration of the last epoch's steps.")
        self.validation_loss = self._gauge("validation.loss", "Loss of the last evaluation.")
        self.validation_accuracy = self._gauge("validation.accuracy", "Accuracy of the last evaluation, 0 to 1.")
        self.training_metric = self._gauge("training.metric", "Metrics that the job logs during steps.", ["name"])
        self.validation_metric = self._gauge(
            "validation.metric", "Metrics of the last evaluation; of a set with a name by SET/NAME.", ["name"]
        )
        self.training_step = self._gauge("training.step", "Optimizer updates completed.")
        self.training_best_step = self._gauge("training.best_step", "Highest step reached; a rollback keeps it.")
        self.training_skipped_steps_total = self._counter(
            "training.skipped_steps_total", "Steps that changed nothing because they were not finite.", ["reason"]
        )
        self.training_skipped_microbatches_total = self._counter(
            "training.skipped_microbatches_total", "Microbatches left out of an update because they were not finite."
        )
        self.training_epoch = self._gauge("training.epoch", "Current epoch, starting at 1.")
        self.training_samples_total = self._counter("training.samples_total", "Training samples processed.")
        self.training_state = self._gauge("training.state", "1 for the current state of the run.", ["state"])
        self.training_last_step_timestamp_seconds = self._gauge(
            "training.last_step_timestamp_seconds", "Unix time of the last update; alert when it stops increasing."
        )
        self.step_duration_seconds = self._histogram(
            "step.duration_seconds", "Duration of an update, including the wait for input.", STEP_BUCKETS_S
        )
        self.step_input_wait_seconds = self._histogram(
            "step.input_wait_seconds", "Time that an update waited for input.", STEP_BUCKETS_S
        )

    def _declare_boundaries(self) -> None:
        self.epoch_hook_latency_ms = self._gauge("epoch_hook.latency_ms", "Duration of the last epoch boundary.")
        self.hook_latency_ms = self._gauge("hook.latency_ms", "Time to build and send the last request between epochs.")
        self.epoch_hook_duration_seconds = self._histogram(
            "epoch_hook.duration_seconds", "Time that epoch boundaries delayed training.", BOUNDARY_BUCKETS_S
        )
        self.mode_conservative = self._gauge("mode.conservative", "1: conservative mode is on.")
        self.mode_conservative_reasons = self._gauge(
            "mode.conservative_reasons", "1: this reason for conservative mode is active.", ["reason"]
        )
        self.seeds_active = self._gauge(
            "seeds.active", "Seeds by stage, both grafted and desired but not yet grafted.", ["stage"]
        )
        self.command_applied_total = self._counter("command.applied_total", "Commands applied.", ["type"])
        self.command_rejected_total = self._counter("command.rejected_total", "Commands rejected.", ["reason"])

    def _declare_peers(self) -> None:
        self.breaker_state = self._gauge("breaker.state", "1 closed, 2 open, 3 half open.", ["breaker"])
        self.timeout_tamiyo_total = self._counter("timeout.tamiyo_total", "Calls to Tamiyo that timed out.")
        self.timeout_kasmina_total = self._counter("timeout.kasmina_total", "Calls to Kasmina that timed out.")
        self.timeout_tamiyo_last_ms = self._gauge("timeout.tamiyo_last_ms", "Duration of the last call to Tamiyo.")
        self.timeout_kasmina_last_ms = self._gauge("timeout.kasmina_last_ms", "Duration of the last call to Kasmina.")
        self.peer_call_duration_seconds = self._histogram(
            "peer.call_duration_seconds", "Duration of calls to peers.", CALL_BUCKETS_S, ["peer", "method", "outcome"]
        )
        self.peer_retries_total = self._counter(
            "peer.retries_total", "Retries of calls to unavailable peers.", ["peer", "method"]
        )

    def _declare_gradients(self) -> None:
        seed = ["seed_id", "stage"]
        self.grad_agg_microbatches_total = self._counter("grad_agg.microbatches_total", "Microbatches merged by rows.")
        self.grad_agg_conflicts = self._gauge("grad_agg.conflicts", "Conflicting pairs of rows in the last epoch.")
        self.grad_agg_weights_mean = self._gauge("grad_agg.weights_mean", "Mean weight of the rows.")
        self.grad_agg_pcgrad_applied = self._gauge("grad_agg.pcgrad_applied", "Share of steps with a projection.")
        self.grad_agg_conflict_ratio = self._gauge("grad_agg.conflict_ratio", "Conflicts divided by max(1, rows - 1).")
        self.grad_agg_pair_conflict_ratio = self._gauge(
            "grad_agg.pair_conflict_ratio", "Conflicts divided by the pairs of rows."
        )
        self.grad_agg_teacher_share = self._gauge("grad_agg.teacher_share", "The host's share of the norms.")
        self.seed_weight = self._gauge("grad_agg.seed.weight", "Mean weight of the seed's row.", seed)
        self.seed_norm = self._gauge("grad_agg.seed.norm", "Mean norm of the seed's row.", seed)
        self.seed_share = self._gauge("grad_agg.seed.share", "The seed's share of the norms.", seed)
        self.seed_share_delta = self._gauge("grad_agg.seed.share_delta", "Change of the share within an epoch.", seed)
        self.seed_alpha = self._gauge("grad_agg.seed.alpha", "Blending factor of the seed.", seed)
        self.seed_conflicts = self._gauge("grad_agg.seed.conflicts", "Mean number of conflicting rows.", seed)
        self.seed_conflict_ratio = self._gauge(
            "grad_agg.seed.conflict_ratio", "Conflicts divided by the other rows.", seed
        )
        self.seed_params = self._gauge("grad_agg.seed.params", "Number of the seed's parameter elements.", seed)
        self.seed_mask_fraction = self._gauge(
            "grad_agg.seed.mask_fraction", "Share of microbatches with its loss.", seed
        )
        self.seed_teacher_share = self._gauge("grad_agg.seed.teacher_share", "The host's share of its row.", seed)
        self.seed_layer_norm = self._gauge(
            "grad_agg.seed.layer_norm", "Largest gradient norms of the seed by layer.", ["seed_id", "layer"]
        )

    def _declare_optimization(self) -> None:
        self.lr_controller_enabled = self._gauge("lr_controller.enabled", "1: learning rates are controlled.")
        self.lr_controller_current_lr = self._gauge("lr_controller.current_lr", "Learning rate.", ["group"])
        self.lr_controller_integrity_violations_total = self._counter(
            "lr_controller.integrity_violations_total", "Learning rates changed by other code.", ["group"]
        )
        self.lr_controller_adjustments_total = self._counter(
            "lr_controller.adjustments_total", "Requested adjustments of learning rates.", ["origin"]
        )
        self.lr_controller_factor = self._gauge(
            "lr_controller.factor", "Smallest factor on learning rates by origin; 1: as scheduled.", ["origin"]
        )
        self.opt_rebuilds_total = self._counter("opt.rebuilds_total", "Optimizer rebuilds.")
        self.opt_rebuild_failures_total = self._counter("opt.rebuild_failures_total", "Failed optimizer rebuilds.")
        self.opt_rebuild_skipped_total = self._counter("opt.rebuild_skipped_total", "Postponed optimizer rebuilds.")
        self.opt_rebuild_latency_ms = self._gauge("opt.rebuild_latency_ms", "Duration of the last rebuild.")
        self.train_compile_enabled = self._gauge("train.compile_enabled", "1: the model is compiled.")
        self.train_amp_enabled = self._gauge("train.amp_enabled", "1: mixed precision.")
        self.train_tf32_enabled = self._gauge("train.tf32_enabled", "1: TF32 matrix products.")
        self.train_foreach_enabled = self._gauge("train.foreach_enabled", "1: fused or foreach optimizer kernels.")
        self.train_pin_memory = self._gauge("train.pin_memory", "1: pinned memory and non-blocking copies.")

    def _declare_emergency(self) -> None:
        self.emergency_level = self._gauge("emergency.level", "0 none, 1 notice, 2 elevated, 3 conservative, 4 halt.")
        self.emergency_halt = self._gauge("emergency.halt", "1: an emergency halts training.")
        self.emergency_halts_total = self._counter("emergency.halts_total", "Emergencies that halted training.")
        self.emergency_broadcasts_total = self._counter("emergency.broadcasts_total", "Broadcasts passed to telemetry.")
        self.emergency_broadcast_failures_total = self._counter(
            "emergency.broadcast_failures_total", "Attempts to broadcast that failed, and lines that were not written."
        )
        self.emergency_bypass_applied_total = self._counter(
            "emergency.bypass_applied_total", "Critical broadcasts that have reached the log's stream or a subscriber."
        )
        self.emergency_bypass_dropped_total = self._counter(
            "emergency.bypass_dropped_total", "Broadcasts lost: always 0; alert when it is not."
        )
        self.emergency_last_broadcast_latency_ms = self._gauge(
            "emergency.last_broadcast_latency_ms", "Time to hand the last broadcast to telemetry."
        )
        self.emergency_shared_signal_degraded = self._gauge(
            "emergency.shared_signal_degraded", "1: the signal board is polled because futexes are unavailable."
        )

    def _declare_rollback(self) -> None:
        self.rollback_fast_size_bytes = self._gauge(
            "rollback.fast_size_bytes", "Memory used by snapshots; what they share counts once."
        )
        self.rollback_restore_latency_ms = self._gauge(
            "rollback.restore_latency_ms", "Duration of the last restore in the lane."
        )
        self.rollback_fast_hits_total = self._counter("rollback.fast_hits_total", "Snapshots found in memory.")
        self.rollback_fast_misses_total = self._counter("rollback.fast_misses_total", "Snapshots not in memory.")
        self.rollback_snapshots_total = self._counter("rollback.snapshots_total", "Snapshots taken.")
        self.rollback_failures_total = self._counter(
            "rollback.failures_total", "Failed rollbacks.", ["stage", "reason"]
        )
        self.rollback_requests_total = self._counter(
            "rollback.requests_total", "Rollbacks that have ended.", ["origin", "outcome"]
        )
        self.rollback_deadline_exceeded_total = self._counter(
            "rollback.deadline_exceeded_total", "Rollbacks that exceeded their budget."
        )
        self.rollback_duration_seconds = self._histogram(
            "rollback.duration_seconds",
            "Time from the trigger to the first step afterwards, or to the failure.",
            ROLLBACK_BUCKETS_S,
            ["tier", "outcome"],
        )
        self.checkpoint_duration_seconds = self._histogram(
            "checkpoint.duration_seconds", "Time to write and commit a checkpoint.", CHECKPOINT_BUCKETS_S
        )
        self.checkpoint_size_bytes = self._gauge("checkpoint.size_bytes", "Size of the newest checkpoint.")
        self.checkpoint_age_seconds = self._gauge(
            "checkpoint.age_seconds", "Time since the newest committed checkpoint, or since the start if there is none."
        )
        self.state_disk_free_bytes = self._gauge("state.disk_free_bytes", "Free space on the disk of state.dir.")
        self.checkpoint_failures_total = self._counter("checkpoint.failures_total", "Failed checkpoint writes.")

    def _declare_process(self) -> None:
        self.lane_up = self._gauge("lane.up", "1 while the lane's process has a job that is built.", ["rank"])
        self.lane_generation = self._gauge("lane.generation", "Number of the lane's process, from 1.", ["rank"])
        self.lane_phase = self._gauge(
            "lane.phase", "1 for what the lane does while the run is running; all 0 otherwise.", ["rank", "phase"]
        )
        self.lane_restarts_total = self._counter(
            "lane.restarts_total", "Lane processes that died, by cause.", ["rank", "cause"]
        )
        self.lane_recovery_seconds = self._histogram(
            "lane.recovery_seconds",
            "Time from the death of a lane's process until the next one has restored a state.",
            RECOVERY_BUCKETS_S,
            ["rank"],
        )
        self.rank_input_wait_seconds = self._gauge(
            "rank.input_wait_seconds", "Waits of a rank for its data in the last epoch.", ["rank"]
        )
        self.rank_wait_seconds = self._gauge(
            "rank.wait_seconds", "Waits of a rank for slower ones in the last epoch; the slowest waits least.", ["rank"]
        )
        self.rank_memory_bytes = self._gauge(
            "rank.memory_bytes", "Most memory that a rank's process has had.", ["rank"]
        )
        self.health_ready = self._gauge("health.ready", "1 while /readyz reports that the service is ready.")
        self.profiler_enabled = self._gauge("profiler.enabled", "1: a trace is being recorded.")
        self.profiler_traces_emitted_total = self._counter("profiler.traces_emitted_total", "Traces written.")
        self.profiler_traces_failed_total = self._counter("profiler.traces_failed_total", "Failed traces.")
        build = "Version of Tolaria and of torch, and the device."
        self._declare("build_info", "info", build, ("version", "torch", "device"))
        self.build_info = Info(PREFIX + "build", build, registry=self.registry)

    def _declare_telemetry(self) -> None:
        self.telemetry_subscribers = self._gauge("telemetry.subscribers", "Subscribers to telemetry packets.")
        self.telemetry_queue_depth = self._gauge(
            "telemetry.queue_depth", "Telemetry packets that wait, over all subscribers."
        )
        self.telemetry_sent_total = self._counter(
            "telemetry.sent_total", "Telemetry packets written to connections of subscribers.", ["priority"]
        )
        self.telemetry_dropped_total = self._counter(
            "telemetry.dropped_total",
            "Log lines dropped because their reader is slow, blocked or gone, and packets of epochs never assembled.",
            ["priority"],
        )
        self.telemetry_subscriber_dropped_total = self._counter(
            "telemetry.subscriber_dropped_total",
            "Telemetry packets that a subscriber was not sent because it is slow; others had them.",
            ["priority"],
        )

    def _declare(
        self, name: str, kind: str, help_text: str, labels: Sequence[str] = (), buckets: Sequence[float] = ()
    ) -> None:
        self._catalogue.append(MetricSpec(PREFIX + name, kind, help_text, tuple(labels), tuple(buckets)))

    def _tally(self, name: str, help_text: str) -> Tally:
        self._declare(name, "counter", help_text)
        return Tally(PREFIX + name, help_text, registry=self.registry)

    def _declare_servers(self) -> None:
        self.server_calls_total = self._counter(
            "server.calls_total", "Calls of the admin server, by token and gRPC status.", ["caller", "code"]
        )
        self.server_credentials_failures_total = self._counter(
            "server.credentials_failures_total", "Changed certificates, tokens or passwords that cannot be used."
        )
        self.server_credentials_current = self._gauge(
            "server.credentials_current", "0: the newest files of this setting cannot be used.", ["setting"]
        )
        self.server_certificate_expires = self._gauge(
            "server.certificate_expires_timestamp_seconds", "When the certificate of this setting expires.", ["setting"]
        )
        self.server_certificate_due = self._gauge(
            "server.certificate_renewal_due", "1: it expires in 14 days, or in 1/5 of its time, at most.", ["setting"]
        )
        self.config_last_reload_successful = self._gauge(
            "config.last_reload_successful", "0: the settings were wrong when they were read again last."
        )
        self.metrics_requests_total = self._counter(
            "metrics.requests_total", "Requests to the metrics server, by user and HTTP status.", ["caller", "code"]
        )
        self.page_viewers = self._gauge("page.viewers", "Viewers of the status page.")
        self.page_viewers_dropped_total = self._counter(
            "page.viewers_dropped_total", "Viewers of the status page that were dropped because they are slow."
        )

    def _declare_tracking(self) -> None:
        self.tracker_up = self._gauge("tracker.up", "Whether a tracker takes what is recorded.", ["tracker"])
        self.tracker_behind_seconds = self._gauge(
            "tracker.behind_seconds", "Age of the oldest record that a tracker has not taken yet.", ["tracker"]
        )
        self.tracker_failures_total = self._counter(
            "tracker.failures_total", "Ends of a tracker's process before the service's.", ["tracker"]
        )
        self.tracker_lost_segments_total = self._counter(
            "tracker.lost_segments_total", "Parts of the log that were removed before a tracker had them.", ["tracker"]
        )
        self.metrics_log_dropped_total = self._counter(
            "metrics_log.dropped_total", "Points that were not recorded, since the disk did not answer."
        )

    def _gauge(self, name: str, help_text: str, labels: Sequence[str] = ()) -> Gauge:
        self._declare(name, "gauge", help_text, labels)
        return Gauge(PREFIX + name, help_text, labels, registry=self.registry)

    def _counter(self, name: str, help_text: str, labels: Sequence[str] = ()) -> Counter:
        self._declare(name, "counter", help_text, labels)
        return Counter(PREFIX + name, help_text, labels, registry=self.registry)

    def _histogram(self, name: str, help_text: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        self._declare(name, "histogram", help_text, labels, buckets)
        return Histogram(PREFIX + name, help_text, labels, registry=self.registry, buckets=buckets)
