"""The overview: what a run does, how it learns, what it waits for, and how it recovers."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards.panels import GREEN, RED, YELLOW, Query, curves, figure, new_dashboard, one, row, timeline

_STATES = {"0": ("", "transparent"), "1": ("yes", "blue")}
_BREAKER = {"1": ("closed", GREEN), "2": ("open", RED), "3": ("half open", YELLOW)}
_LEVELS = {"0": "none", "1": "notice", "2": "elevated", "3": "conservative", "4": "halt"}
_YES = {"0": "no", "1": "yes"}


def quantile(share: float, histogram: str, *by: str) -> str:
    """Returns the expression of a quantile of the last five minutes."""
    labels = ", ".join(("le", *by))
    return f"histogram_quantile({share}, sum by ({labels}) (rate({one(histogram + '_bucket')}[5m])))"


def overview() -> Dashboard:
    """Returns the dashboard."""
    board = new_dashboard("tolaria-overview", "Tolaria", "One run: state, training, boundaries, peers and recovery.")
    for add in (_now, _hazards, _states, _training, _boundaries, _recovery, _process):
        board = add(board)
    return board


def _now(board: Dashboard) -> Dashboard:
    return (
        board.with_row(row("Now"))
        .with_panel(
            figure(
                "Ready",
                "What /readyz says.",
                Query(one("tolaria_health_ready"), "ready"),
                limits=((None, RED), (1.0, GREEN)),
                texts=_YES,
            )
        )
        .with_panel(figure("Epoch", "The current epoch, from 1.", Query(one("tolaria_training_epoch"), "epoch")))
        .with_panel(figure("Step", "Optimizer updates.", Query(one("tolaria_training_step"), "step")))
        .with_panel(
            figure(
                "Alerts",
                "Alerts that fire for this run; docs/runbook.md explains each.",
                Query('count(ALERTS{instance="$instance", alertstate="firing"}) or vector(0)', "firing"),
                limits=((None, GREEN), (1.0, RED)),
            )
        )
    )


def _hazards(board: Dashboard) -> Dashboard:
    return (
        board.with_panel(
            figure(
                "Conservative mode",
                "The host trains on; Tamiyo is not asked.",
                Query(one("tolaria_mode_conservative"), "on"),
                limits=((None, GREEN), (1.0, YELLOW)),
                texts=_YES,
            )
        )
        .with_panel(
            figure(
                "Emergency",
                "The level of the active emergency.",
                Query(one("tolaria_emergency_level"), "level"),
                limits=((None, GREEN), (1.0, YELLOW), (4.0, RED)),
                texts=_LEVELS,
            )
        )
        .with_panel(
            figure(
                "Newest checkpoint",
                "What a crash would lose.",
                Query(one("tolaria_checkpoint_age_seconds"), "age"),
                unit="s",
                limits=((None, GREEN), (3600.0, YELLOW)),
            )
        )
        .with_panel(
            figure(
                "Free space",
                "On the disk of state.dir.",
                Query(one("tolaria_state_disk_free_bytes"), "free"),
                unit="bytes",
                limits=((None, RED), (2.56e8, YELLOW), (2e9, GREEN)),
            )
        )
    )


def _states(board: Dashboard) -> Dashboard:
    return board.with_panel(
        timeline(
            "State of the run",
            "Which state the run was in.",
            Query(f"{one('tolaria_training_state')} == 1", "{{state}}"),
            texts=_STATES,
            height=6,
        )
    ).with_panel(
        timeline(
            "What the lane does",
            "While the run is running. Evaluating, loading and compiling take time without steps.",
            Query(f"{one('tolaria_lane_phase')} == 1", "{{phase}}"),
            texts=_STATES,
            height=6,
        )
    )


def _training(board: Dashboard) -> Dashboard:
    return (
        board.with_row(row("Training"))
        .with_panel(
            curves(
                "Loss",
                "Mean training loss of the last epoch, and the loss of the last evaluation.",
                Query(one("tolaria_training_loss"), "training"),
                Query(one("tolaria_validation_loss"), "validation"),
            )
        )
        .with_panel(
            curves(
                "Accuracy",
                "Of the last evaluation.",
                Query(one("tolaria_validation_accuracy"), "validation"),
                unit="percentunit",
            )
        )
        .with_panel(
            curves(
                "Learning rates",
                "By param group, with all adjustments.",
                Query(one("tolaria_lr_controller_current_lr"), "{{group}}"),
                unit="sci",
            )
        )
        .with_panel(
            curves(
                "Throughput",
                "Samples and steps a second, over five minutes.",
                Query(one("tolaria:samples:rate5m"), "samples/s"),
                Query(one("tolaria:steps:rate5m"), "steps/s"),
            )
        )
        .with_panel(
            curves(
                "Step",
                "Duration of an update, including the wait for input.",
                Query(one("tolaria:step_duration_seconds:mean5m"), "mean"),
                Query(quantile(0.5, "tolaria_step_duration_seconds"), "p50"),
                Query(quantile(0.99, "tolaria_step_duration_seconds"), "p99"),
                unit="s",
            )
        )
        .with_panel(
            curves(
                "Waiting and skipping",
                "The share of the step time in which the model waits for data, and that of skipped steps.",
                Query(one("tolaria:step_input_wait:ratio5m"), "waiting for data"),
                Query(one("tolaria:skipped_steps:ratio15m"), "skipped"),
                unit="percentunit",
            )
        )
    )


def _boundaries(board: Dashboard) -> Dashboard:
    return (
        board.with_row(row("Epoch boundaries and peers"))
        .with_panel(
            curves(
                "Delay by boundaries",
                "By how much epoch boundaries delay training. The budget is 18 ms.",
                Query(f"{one('tolaria_epoch_hook_latency_ms')} / 1000", "last"),
                Query(one("tolaria:epoch_hook_duration_seconds:p99_1h"), "p99 over an hour"),
                unit="s",
            )
        )
        .with_panel(
            curves(
                "Boundaries over budget",
                "The objective is at most 1 %.",
                Query(one("tolaria:boundaries_over_budget:ratio1h"), "over an hour"),
                Query(one("tolaria:boundaries_over_budget:ratio6h"), "over six hours"),
                unit="percentunit",
            )
        )
        .with_panel(
            timeline(
                "Circuit breakers",
                "An open one spares a peer, or a mechanism, that fails.",
                Query(one("tolaria_breaker_state"), "{{breaker}}"),
                texts=_BREAKER,
                span=8,
            )
        )
        .with_panel(
            curves(
                "Calls to peers",
                "Calls a second by outcome.",
                Query(f"{one('tolaria:peer_calls:rate5m')} > 0", "{{peer}} {{outcome}}"),
                unit="cps",
            )
        )
        .with_panel(
            curves(
                "Duration of calls",
                "99 % are faster.",
                Query(one("tolaria:peer_call_duration_seconds:p99_5m"), "{{peer}}"),
                unit="s",
            )
        )
        .with_panel(
            curves(
                "Timeouts and commands",
                "The share of calls that time out, and commands of Tamiyo within an hour.",
                Query(one("tolaria:peer_timeouts:ratio15m"), "{{peer}} timeouts"),
                Query(f"increase({one('tolaria_command_applied_total')}[1h]) > 0", "{{type}} applied"),
                Query(f"increase({one('tolaria_command_rejected_total')}[1h]) > 0", "{{reason}} rejected"),
            )
        )
    )


def _recovery(board: Dashboard) -> Dashboard:
    return (
        board.with_row(row("Recovery and storage"))
        .with_panel(
            curves(
                "Rollbacks within an hour",
                "By who requested them.",
                Query(one("tolaria:rollbacks:increase1h"), "{{origin}}"),
            )
        )
        .with_panel(
            curves(
                "Duration of rollbacks",
                "From the trigger to the first good step; 99 % are faster.",
                Query(quantile(0.99, "tolaria_rollback_duration_seconds", "tier"), "{{tier}}"),
                unit="s",
            )
        )
        .with_panel(
            curves(
                "Deaths of the lane",
                "Within an hour, by rank, and how long the last recoveries took.",
                Query(one("tolaria:lane_restarts:increase1h"), "rank {{rank}}"),
                Query(quantile(0.99, "tolaria_lane_recovery_seconds", "rank"), "rank {{rank}} recovery, s"),
            )
        )
        .with_panel(
            curves(
                "Age of the newest checkpoint",
                "Rises until one is committed.",
                Query(one("tolaria_checkpoint_age_seconds"), "age"),
                unit="s",
            )
        )
        .with_panel(
            curves(
                "Checkpoints",
                "How long a write takes; failures are an alert.",
                Query(quantile(0.99, "tolaria_checkpoint_duration_seconds"), "p99 of a write"),
                Query(f"rate({one('tolaria_checkpoint_failures_total')}[5m])", "failures a second"),
                unit="s",
            )
        )
        .with_panel(
            curves(
                "Sizes",
                "Snapshots in memory, and a checkpoint.",
                Query(one("tolaria_rollback_fast_size_bytes"), "snapshots"),
                Query(one("tolaria_checkpoint_size_bytes"), "checkpoint"),
                unit="bytes",
            )
        )
    )


def _process(board: Dashboard) -> Dashboard:
    return (
        board.with_row(row("The service"))
        .with_panel(
            curves(
                "Memory",
                "Of the service's process, without the lane.",
                Query(one("process_resident_memory_bytes"), "resident"),
                unit="bytes",
            )
        )
        .with_panel(
            curves(
                "CPU and descriptors",
                "Cores in use by the service's process, and the share of its file descriptors.",
                Query(f"rate({one('process_cpu_seconds_total')}[5m])", "cores"),
                Query(f"{one('process_open_fds')} / {one('process_max_fds')}", "descriptors"),
            )
        )
        .with_panel(
            curves(
                "Telemetry",
                "Subscribers, their queues, and what was dropped by priority.",
                Query(one("tolaria_telemetry_subscribers"), "subscribers"),
                Query(one("tolaria_telemetry_queue_depth"), "queued"),
                Query(f"rate({one('tolaria_telemetry_dropped_total')}[5m])", "{{priority}} dropped/s"),
                Query(
                    f"rate({one('tolaria_telemetry_subscriber_dropped_total')}[5m])",
                    "{{priority}} dropped for subscribers/s",
                ),
            )
        )
    )
