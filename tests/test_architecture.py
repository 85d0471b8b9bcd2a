"""Rules of the architecture that no off-the-shelf tool checks, and tests of those checks on bad code."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from support.architecture import (
    LEVELS_MAX,
    ImportGraph,
    Module,
    banned_words,
    duplicate_classes,
    modules_of,
    repeated_defaults,
    single_implementer_protocols,
    sizes,
    unknown_names,
)
from support.processes import python_path
from tolaria.config import Settings

ROOT = Path(__file__).parents[1]
MODULES = modules_of(ROOT / "service" / "tolaria")
SUBPACKAGES = sorted({module.place.split("/")[0] for module in MODULES if "/" in module.place})
LINES_MAX, FILES_MAX = 60_000, 370

GLOSSARY: dict[str, tuple[str, ...]] = {
    "": (
        "cgroups", "filesystem", "forks", "grpc_server", "images", "probe", "processes", "segments", "shards",
        "tensors", "wire",
    ),
    "adapters": ("hf", "lightning", "loaders"),
    "checkpoint": (
        "archive", "backup", "directory", "format", "inspection", "restoration", "runs", "rotation", "storage", "store",
        "tensor_file", "upgrade", "writer",
    ),
    "cli": (
        "admin_commands", "answers", "audit", "backups", "board", "branches", "channel", "chaos", "client", "commands",
        "completion", "config_commands", "credentials", "curves", "demo", "doctor", "errors", "exports", "harm",
        "job_commands", "lane_commands", "main", "process_tree", "render", "report", "runs", "serve_child", "skip",
        "state_commands", "telemetry",
    ),
    "config": (
        "changes", "connections", "durability", "exposure", "extras", "fields", "network", "presets", "ranks",
        "retired", "settings", "sources", "systemd", "telemetry", "tracking", "training",
    ),
    "emergency": ("broadcast", "controller", "protocol", "sentinel", "supervision"),
    "errors": ("base", "operation", "training"),
    "export": ("card", "conversion", "folding", "loading", "source", "warm_start", "writing"),
    "gradients": (
        "accumulate", "aggregators", "flat", "gram", "pcgrad", "rows", "seed_metrics", "sharded", "tracker", "weights",
    ),
    "jobs": ("callbacks", "data", "digits", "indexed", "intervals", "job", "loader", "randomness", "workers"),
    "journal": ("async_journal", "database", "migration", "reader", "reserve", "rows"),
    "lane": (
        "buffers", "build", "commands", "connection", "device", "early_stopping", "encoding", "evaluation",
        "fast_paths", "first_look", "gradient_merge", "group_commands", "group_profiles", "group_state", "hosting",
        "job_callbacks", "job_effects", "job_output", "job_report", "job_schedules", "lane", "messages",
        "model_description", "order", "parameter_check", "process", "profiling", "rank", "rank_failures",
        "seed_training", "sharding", "skipped_batches", "snapshot_manager", "step", "step_losses", "train_module",
        "trained_flags", "weight_averages",
    ),
    "optimization": (
        "adjustments", "groups", "hyperparameters", "job_schedule", "lr_controller", "optimizer_manager", "schedules",
        "state_transfer", "weight_decay",
    ),
    "peers": ("clients", "connect", "consultation", "verification"),
    "ranks": (
        "admission", "agent", "channel", "child", "elastic", "gathering", "group", "images", "liveness", "local_ranks",
        "node", "output", "replica_store", "replicas", "share", "shared_segments", "stacks", "step_word",
    ),
    "reference": ("embedded", "history", "kasmina", "lifecycle", "policy", "rollback", "server", "tamiyo", "tracing"),
    "resilience": ("breaker", "conservative", "deadline"),
    "rollback": ("coordinator", "protocol"),
    "rpc": ("admin", "audit", "callers", "data_skips", "exports", "listing", "requests", "status", "telemetry"),
    "run": (
        "adjustments", "boundary", "branches", "checkpointing", "command_handler", "conditions", "data_skips",
        "health", "health_record", "journal_observer", "lane_client", "lane_telemetry", "missing_metrics",
        "observers", "operations", "pace", "packet_telemetry", "profiling", "recovery", "replicas", "restore_points",
        "restorer", "resume", "revival", "run", "run_state", "safety", "safety_telemetry", "seed_telemetry", "status",
        "step_places", "tracking_telemetry", "training_telemetry", "verdicts",
    ),
    "security": ("certificates", "issuing", "limits", "tokens", "watched", "web_config"),
    "seeds": ("alpha", "blueprints", "plan", "slots", "stages", "topology"),
    "service": (
        "credentials", "expiry", "foundation", "host", "listeners", "notify", "protection", "readiness", "reload",
        "replicas", "settings_record", "start", "wiring",
    ),
    "signals": ("board", "futex", "lane_page", "lane_pulse", "layout", "mapping", "seqlock", "writers"),
    "state": ("arenas", "encoding", "restore", "shared_memory", "snapshots", "training_state"),
    "status_page": ("earlier", "curves", "frames", "history", "sections", "seed_timeline", "site"),
    "telemetry": (
        "events", "exporter", "logging", "metrics", "otlp", "packets", "subscriptions", "tracing", "web_server",
    ),
    "trackers": (
        "feed", "metrics_log", "mlflow", "process", "records", "supervision", "tensorboard", "tracker", "wandb",
    ),
    "transport": (
        "lane_end", "lane_images", "lane_link", "lane_process", "lane_stacks", "lane_start", "nodes", "process_lane",
        "rendezvous", "replica_exchange", "replicas", "spare_lane",
    ),
    "values": (
        "encoding", "evaluation", "failure", "gradients", "lineage", "loss_window", "optimization", "seeds", "spans",
        "training",
    ),
}  # fmt: skip
"""The modules of each subpackage, named by standard terms. Add new modules here and in docs/architecture.md."""

EXEMPT_PROTOCOLS: dict[str, str] = {
    "TrainingJob": "jobs are the user's own",
    "EvaluatingJob": "jobs are the user's own",
    "TrainModeJob": "jobs are the user's own",
    "BatchCursor": "data may be the user's own",
    "StatefulJob": "jobs are the user's own",
    "ScheduledJob": "jobs are the user's own",
    "CallbackJob": "jobs are the user's own",
    "ShardedJob": "jobs are the user's own",
    "SharingJob": "jobs are the user's own",
    "StatefulLoader": "loaders may be the user's own",
    "HasState": "data sets are the user's own",
    "HasEpoch": "samplers and data sets are the user's own",
    "_HasItems": "data sets are the user's own",
    "LaneOwner": "the process of a lane and its owner do not import each other",
    "GroupOwner": "the rendezvous and the owner of its group do not import each other",
    "LaneHandle": "run and lane do not import each other",
    "LaneHeartbeat": "lane and emergency do not import each other",
    "LaneBuild": "service loads the lane by name, so that it imports no torch",
    "Restorer": "rollback and run do not import each other",
    "_Order": "peers and rollback do not import each other",
    "RollbackParticipant": "rollback and peers do not import each other",
    "ParticipantResponse": "rollback and peers do not import each other",
    "LiveTraining": "state and lane do not import each other",
    "MutatingRequest": "the generated messages have no common base class",
}
"""Protocols with one implementer: between packages that must not import each other, or for the user's classes."""

BROAD_EXCEPT_ALLOWED = {
    "jobs/job.py": "imports the user's own code",
    "jobs/loader.py": "reads the user's own data",
    "jobs/workers.py": "reads the user's own data",
    "seeds/blueprints.py": "calls the user's own code",
    "seeds/slots.py": "calls the user's own code",
    "export/folding.py": "runs the user's own code",
    "lane/model_description.py": "calls the user's own code",
    "lane/first_look.py": "calls the user's own code",
    "lane/fast_paths.py": "tries kernels of torch, which raise several kinds of errors",
    "lane/job_output.py": "calls the user's own code",
    "lane/job_callbacks.py": "calls the user's own code",
    "lane/lane.py": "calls the user's own code",
    "optimization/optimizer_manager.py": "calls the user's own optimizer",
    "optimization/job_schedule.py": "calls the user's own scheduler",
    "rpc/exports.py": "fails the export, and logs defects: it runs in the task group of the run",
    "telemetry/packets.py": "loses a packet, and logs defects: it runs in the task group of the run",
    "checkpoint/writer.py": "passes the error on in a future, and raises defects again",
}
"""Where anything may be raised and is reported."""


def ids(module: Module) -> str:
    """The test's id."""
    return module.place


@pytest.mark.parametrize("module", MODULES, ids=ids)
def test_files_functions_and_constructors_stay_small(module: Module) -> None:
    """Files of 30 to 450 lines, functions of at most 70, constructors of at most 8 parameters."""
    assert sizes(module) == []


@pytest.mark.parametrize("module", MODULES, ids=ids)
def test_the_code_uses_standard_terms(module: Module) -> None:
    """No banned word occurs."""
    assert banned_words(module) == []


def test_every_module_is_named_by_a_noun_of_the_glossary() -> None:
    """A module that is not in the glossary needs a reason, and an entry."""
    assert unknown_names(MODULES, GLOSSARY) == []


def test_the_service_stays_small() -> None:
    """The lines and files of the whole service are limited."""
    lines = {module.place: module.source.count("\n") for module in MODULES}
    assert sum(lines.values()) <= LINES_MAX, lines
    assert len(lines) <= FILES_MAX


def test_no_class_is_written_twice() -> None:
    """Neither by name nor by its fields."""
    assert duplicate_classes(MODULES) == []


def test_protocols_have_two_implementers_or_stand_at_a_border() -> None:
    """An interface with one implementation is that implementation."""
    assert single_implementer_protocols(MODULES, EXEMPT_PROTOCOLS) == []


def test_a_default_of_a_setting_is_written_once() -> None:
    """In the settings; everything else gets it passed in."""
    fields = [name for section in Settings.model_fields.values() for name in section.annotation.model_fields]  # type: ignore[union-attr]
    assert repeated_defaults(MODULES, fields) == []


@cache
def import_graph() -> ImportGraph:
    """Returns which module imports which."""
    return ImportGraph.of(MODULES)


def test_there_are_no_import_cycles() -> None:
    """Nor among the modules of one subpackage."""
    assert import_graph().cycles() == []


@pytest.mark.parametrize("subpackage", SUBPACKAGES)
def test_subpackages_have_few_levels(subpackage: str) -> None:
    """At most 9 from the top module of a subpackage to its lowest."""
    assert import_graph().levels(f"tolaria.{subpackage}") <= LEVELS_MAX


def test_the_service_starts_without_torch() -> None:
    """Until the lane is built nothing of the service has imported torch; nor have the command line and the peers."""
    code = "import sys, tolaria.service, tolaria.cli.main, tolaria.reference.server; print('torch' in sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=180, check=True,
        env={"PYTHONPATH": python_path()},
    )  # fmt: skip
    assert found.stdout.strip() == "False"


@pytest.mark.parametrize("module", MODULES, ids=ids)
def test_the_environment_is_read_in_config_only(module: Module) -> None:
    """os.environ and os.getenv belong to the settings."""
    uses = {node.attr for node in module.nodes() if isinstance(node, ast.Attribute)} & {"environ", "getenv", "putenv"}
    assert not uses or module.place.startswith("config/")


@pytest.mark.parametrize("module", MODULES, ids=ids)
def test_tasks_are_started_in_task_groups_only(module: Module) -> None:
    """No create_task or ensure_future; start_soon beside the task group, in the service, or in a group passed by it."""
    for node in module.nodes():
        if isinstance(node, ast.Attribute):
            assert node.attr not in {"create_task", "ensure_future", "run_coroutine_threadsafe"}
    if not module.place.startswith("service/") and "start_soon" in module.source:
        assert "create_task_group" in module.source or module.place == "rpc/requests.py"


@pytest.mark.parametrize("module", MODULES, ids=ids)
def test_broad_excepts_are_where_user_code_is_called(module: Module) -> None:
    """`except Exception` hides mistakes, unless it raises again or surrounds the user's own code."""
    for node in module.nodes():
        if isinstance(node, ast.ExceptHandler):
            kinds = ast.unparse(node.type) if node.type else "bare"
            broad = kinds == "bare" or {"Exception", "BaseException"} & set(kinds.strip("()").split(", "))
            raises_again = isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None
            assert not broad or raises_again or module.place in BROAD_EXCEPT_ALLOWED, f"line {node.lineno}"


def test_no_path_of_a_machine_is_named() -> None:
    """Nothing in the repository's texts holds a path of the machine it was written on."""
    texts = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "deploy").rglob("*.*"), *(ROOT / "docs").rglob("*.md")]
    for text in [*(module.source for module in MODULES), *(path.read_text() for path in texts if path.is_file())]:
        assert "/work/" not in text


# -- the checks themselves ------------------------------------------------------------------------------------------

LONG_FUNCTION = '"""Doc."""\ndef f():\n' + "    pass\n" * 71
MANY_PARAMETERS = (
    '"""Doc."""\nclass A:\n    def __init__(self, a, b, c, d, e, *, f, g, h, i):\n        pass\n' + "\n" * 30
)
FILLED = '"""Doc."""\n' + "\n" * 40


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        (FILLED, None),
        ('"""Doc."""\n' + "\n" * 451, "452 lines"),
        ('"""Doc."""\n', "only 1 lines"),
        ("x = 1\n" * 40, "no docstring"),
        (LONG_FUNCTION, "f: 72 lines"),
        (MANY_PARAMETERS, "a constructor with 9 parameters"),
    ],
)
def test_the_check_of_sizes(source: str, problem: str | None) -> None:
    """Finds each kind of excess, and nothing in a sound module."""
    found = sizes(Module("room/thing.py", source))
    assert (problem is None) == (found == [])
    assert problem is None or problem in found[0]


@pytest.mark.parametrize(
    "line", ['"""Nobody is told."""', "# whoever asks", "hearts = 1", "class Errand:", "def must_not_know(): ..."]
)
def test_the_check_of_words(line: str) -> None:
    """Finds them in docstrings, comments and names; a word inside another is none."""
    assert banned_words(Module("room/thing.py", f"x = 1\n{line}\n"))[0].startswith("room/thing.py:2")
    assert banned_words(Module("room/thing.py", "understands = collapse_of_the_sweetheartless\n")) == []


def test_the_check_of_names() -> None:
    """A module has to be in the glossary of its subpackage."""
    modules = [Module("run/health.py", ""), Module("run/laps.py", ""), Module("run/__init__.py", "")]
    assert unknown_names(modules, {"run": ("health",), "lane": ("laps",)}) == [
        "run/laps.py: not in the glossary of run"
    ]


def test_the_check_of_duplicates() -> None:
    """The same name in two modules, and the same fields under two names."""
    first = Module("a.py", "@dataclass\nclass Point:\n    x: int\n    y: int\n")
    same_name = Module("b.py", "class Point:\n    pass\n")
    same_fields = Module("c.py", "@dataclass(frozen=True)\nclass Place:\n    y: int\n    x: int\n")
    assert duplicate_classes([first]) == []
    assert duplicate_classes([first, same_name]) == ["Point: in a.py, b.py"]
    assert duplicate_classes([first, same_fields]) == ["the same fields: a.py Point, c.py Place"]


def test_the_check_of_protocols() -> None:
    """One implementer is too few, two are enough; a listed protocol is exempt."""
    protocol = Module("a.py", "class Reader(Protocol):\n    def read(self): ...\n")
    one = Module("b.py", "class File:\n    def read(self): ...\n")
    two = Module("c.py", "class Socket:\n    def read(self): ...\n    def close(self): ...\n")
    assert single_implementer_protocols([protocol, one, two], []) == []
    assert len(single_implementer_protocols([protocol, one], [])) == 1
    assert single_implementer_protocols([protocol, one], ["Reader"]) == []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("def f(retry_s=5.0): ...", 1),
        ("async def f(*, retry_s: float = 5): ...", 1),
        ("def f(retry_s): ...", 0),
        ("def f(other=5.0): ...", 0),
        ("def f(retry_s=0): ...", 0),
    ],
)
def test_the_check_of_defaults(source: str, count: int) -> None:
    """A number as the default of a parameter that is named as a setting; zero is no default."""
    assert len(repeated_defaults([Module("run/a.py", source)], ["retry_s"])) == count
    assert repeated_defaults([Module("config/a.py", source)], ["retry_s"]) == []


@pytest.mark.parametrize(
    ("imports", "cycles"),
    [
        (("", ""), []),
        (("from tolaria.b import x", ""), []),
        (("from tolaria.b import x", "import tolaria.a"), ["tolaria.a", "tolaria.b"]),
        (("from tolaria import b", "from tolaria.a import y"), ["tolaria.a", "tolaria.b"]),
    ],
)
def test_the_check_of_cycles(imports: tuple[str, str], cycles: list[str]) -> None:
    """Every module on a cycle is named."""
    modules = [Module("a.py", imports[0]), Module("b.py", imports[1])]
    assert ImportGraph.of(modules).cycles() == cycles


def test_the_check_of_levels() -> None:
    """The longest chain inside a subpackage counts; imports of other subpackages do not."""
    chain = [Module(f"room/m{n}.py", f"from tolaria.room.m{n + 1} import x") for n in range(8)]
    modules = [*chain, Module("room/m8.py", "import tolaria.other"), Module("other.py", "")]
    assert ImportGraph.of(modules).levels("tolaria.room") == 9
    assert ImportGraph.of(modules).levels("tolaria.elsewhere") == 0
