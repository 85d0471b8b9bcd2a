"""The dashboard of seeds: their stages, their part of the gradients, and where they conflict."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard

from dashboards.panels import Query, curves, figure, new_dashboard, one, row


def seeds() -> Dashboard:
    """Returns the dashboard."""
    board = new_dashboard("tolaria-seeds", "Tolaria seeds", "Seeds of one run, and gradients by source.")
    for add in (_population, _shares, _conflicts, _optimizer):
        board = add(board)
    return board


def _by_seed(metric: str) -> Query:
    return Query(one(f"tolaria_grad_agg_seed_{metric}"), "{{seed_id}} ({{stage}})")


def _population(board: Dashboard) -> Dashboard:
    growing = "germinated|training|blending|shadowing|probationary"
    count = f'sum(tolaria_seeds_active{{instance="$instance", stage=~"{growing}"}})'
    return (
        board.with_row(row("Seeds"))
        .with_panel(
            figure("Growing", "Seeds that are trained or blended (seeds.active_max).", Query(count, "growing"), span=4)
        )
        .with_panel(
            figure(
                "Fossilized",
                "Seeds that are part of the model (seeds.fossilized_max).",
                Query(one("tolaria_seeds_active", stage="fossilized"), "fossilized"),
                span=4,
            )
        )
        .with_panel(
            figure(
                "Culled",
                "Seeds that were removed and are still reported.",
                Query(one("tolaria_seeds_active", stage="culled"), "culled"),
                span=4,
            )
        )
        .with_panel(
            figure(
                "Commands applied",
                "Seed commands of Tamiyo.",
                Query(one("tolaria_command_applied_total", type="seed"), "applied"),
                span=4,
            )
        )
        .with_panel(
            figure(
                "Commands refused",
                "Commands of Tamiyo that changed nothing, by all reasons.",
                Query('sum(tolaria_command_rejected_total{instance="$instance"})', "refused"),
                span=4,
            )
        )
        .with_panel(
            figure("Rebuilds", "Of the optimizer.", Query(one("tolaria_opt_rebuilds_total"), "rebuilds"), span=4)
        )
        .with_panel(
            curves(
                "Stages",
                "Seeds by stage.",
                Query(f"{one('tolaria_seeds_active')} > 0", "{{stage}}"),
                span=12,
                stacked=True,
            )
        )
        .with_panel(
            curves(
                "Alpha",
                "How far a seed's output is blended in.",
                _by_seed("alpha"),
                unit="percentunit",
                span=12,
            )
        )
    )


def _shares(board: Dashboard) -> Dashboard:
    return (
        board.with_row(row("Gradients by source"))
        .with_panel(curves("Weights", "Mean weight of a source's row.", _by_seed("weight")))
        .with_panel(
            curves("Shares", "A source's share of the norms.", _by_seed("share"), unit="percentunit", stacked=True)
        )
        .with_panel(curves("Norms", "Mean norm of a source's row.", _by_seed("norm"), unit="sci"))
        .with_panel(
            curves(
                "Change of shares",
                "Within an epoch; a jump is an event.",
                _by_seed("share_delta"),
                unit="percentunit",
            )
        )
        .with_panel(
            curves(
                "Batches with a loss",
                "The share of microbatches in which a source has one, and the host's share of its row.",
                _by_seed("mask_fraction"),
                Query(one("tolaria_grad_agg_seed_teacher_share"), "{{seed_id}} teacher"),
                unit="percentunit",
            )
        )
        .with_panel(curves("Parameters", "Elements of a source's parameters.", _by_seed("params")))
    )


def _conflicts(board: Dashboard) -> Dashboard:
    return (
        board.with_row(row("Conflicts"))
        .with_panel(
            curves(
                "Conflicts by source",
                "The share of the other rows that oppose a source's row.",
                _by_seed("conflict_ratio"),
                unit="percentunit",
            )
        )
        .with_panel(
            curves(
                "All conflicts",
                "The share of pairs of rows that oppose each other, and of steps with a projection.",
                Query(one("tolaria_grad_agg_pair_conflict_ratio"), "pairs"),
                Query(one("tolaria_grad_agg_pcgrad_applied"), "steps with a projection"),
                Query(one("tolaria_grad_agg_teacher_share"), "host's share"),
                unit="percentunit",
            )
        )
        .with_panel(
            curves(
                "Largest layers",
                "The five largest gradient norms by seed and layer.",
                Query(f"topk(5, {one('tolaria_grad_agg_seed_layer_norm')})", "{{seed_id}} {{layer}}"),
                unit="sci",
            )
        )
    )


def _optimizer(board: Dashboard) -> Dashboard:
    return (
        board.with_row(row("Optimizer"))
        .with_panel(
            curves(
                "Learning rates",
                "By param group: the host and each seed.",
                Query(one("tolaria_lr_controller_current_lr"), "{{group}}"),
                unit="sci",
            )
        )
        .with_panel(
            curves(
                "Factors on learning rates",
                "The smallest factor in force, by origin; 1: as scheduled.",
                Query(one("tolaria_lr_controller_factor"), "{{origin}}"),
            )
        )
        .with_panel(
            curves(
                "Rebuilds",
                "How long the last rebuild took, and failures within an hour.",
                Query(f"{one('tolaria_opt_rebuild_latency_ms')} / 1000", "last"),
                Query(f"increase({one('tolaria_opt_rebuild_failures_total')}[1h])", "failures"),
                unit="s",
            )
        )
    )
