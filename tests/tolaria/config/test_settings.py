from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from google.protobuf.descriptor import ServiceDescriptor

from leyline.v1 import kasmina_service_pb2, tamiyo_service_pb2
from tolaria import config
from tolaria.config import Address, KasminaSettings, PeerSettings, Settings, TamiyoSettings, as_toml, load_settings
from tolaria.config.retired import RETIRED
from tolaria.errors import ConfigurationError


def test_each_setting_is_documented() -> None:
    """Each section and each field has a docstring, which `config show` prints."""
    for section in Settings.model_fields.values():
        assert section.annotation is not None
        assert section.annotation.__doc__
        for name, field in section.annotation.model_fields.items():
            assert field.description, name


def test_each_setting_is_read() -> None:
    """A setting that no code reads would have no effect."""
    root = Path(config.__file__).parent
    declarations = {root / "settings.py", root / "durability.py", root / "network.py"}
    sources = "".join(path.read_text() for path in root.parent.rglob("*.py") if path not in declarations)
    fields = [
        name
        for section_name, section in Settings.model_fields.items()
        for name in section.annotation.model_fields  # type: ignore[union-attr]
        if (section_name, name) not in RETIRED
    ]
    sources += inspect.getsource(PeerSettings.timeout_of)
    assert [name for name in fields if f".{name}" not in sources] == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["server.listen=127.0.0.1:9464"], "server.listen and metrics.listen"),
        (["control.tamiyo_budget_ms=20"], "control.tamiyo_budget_ms"),
        (["leyline.previous_secret=old"], "leyline.secret"),
        (["optimizer.policy=step"], "optimizer.period_steps"),
        (["service.drain_timeout_s=20"], "emergency.drain_s must exceed service.drain_timeout_s"),
        (["lane.processes=2"], "lane.processes is 2, which needs lane.mode = torchrun"),
        (["rollback.replicas=1"], "rollback.replicas is 1, which needs lane.mode = torchrun and lane.nodes"),
        (["rollback.replicas=1", "lane.mode=torchrun", "lane.processes=2"], "lane.nodes with several machines"),
        (["lane.processes=2", "lane.mode=torchrun", "training.device=cuda:1"], "each of the 2 ranks"),
        (["kasmina.drain_s=10"], "kasmina.drain_s must be less than service.drain_timeout_s"),
        (["leyline.nonce_window_s=10"], "leyline.nonce_window_s"),
        (["leyline.nonce_window_s=119"], "twice leyline.freshness_s, which counts both ways"),
        (["checkpoint.best=noisy/ppl"], "noisy/ppl:min or noisy/ppl:max"),
        (["checkpoint.best=f1:highest"], "neither accuracy nor loss nor NAME:min or NAME:max"),
        (["leyline.freshness_s=151"], "twice leyline.freshness_s, which counts both ways"),
    ],
)
def test_inconsistent_settings_are_rejected(overrides: list[str], words: str) -> None:
    """Values that are valid alone and inconsistent together are a problem."""
    with pytest.raises(ConfigurationError) as caught:
        load_settings(None, overrides)
    (problem,) = caught.value.problems
    assert words in problem


@pytest.mark.parametrize(
    ("kind", "service"),
    [
        (TamiyoSettings, tamiyo_service_pb2.DESCRIPTOR.services_by_name["TamiyoService"]),
        (KasminaSettings, kasmina_service_pb2.DESCRIPTOR.services_by_name["KasminaService"]),
    ],
)
def test_peer_methods_are_those_of_the_contract(kind: type[PeerSettings], service: ServiceDescriptor) -> None:
    """Each method of a peer's service may have its own deadline."""
    assert set(kind.methods) == {method.name for method in service.methods}


def test_timeout_of_a_method_defaults_to_the_common_timeout() -> None:
    """timeouts_s overrides timeout_s by method."""
    tamiyo = TamiyoSettings(timeout_s=3.0, timeouts_s={"EvaluateStep": 0.5})
    assert (tamiyo.timeout_of("EvaluateEpoch"), tamiyo.timeout_of("EvaluateStep")) == (3.0, 0.5)


def test_peer_drain_time_may_be_zero() -> None:
    """Zero cancels the calls in flight immediately."""
    assert load_settings(None, ["tamiyo.drain_s=0"]).tamiyo.drain_s == 0


@pytest.mark.parametrize("text", ["127.0.0.1:80", "[::1]:80", "tamiyo:50052", "0.0.0.0:0"])
def test_address_round_trips_through_text(text: str) -> None:
    """Formatting a parsed address gives the same text."""
    assert str(Address.parse(text)) == text


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("[::1]", True),
        ("10.0.0.1", False),
        ("peer", False),
    ],
)
def test_loopback_addresses_are_known(host: str, *, loopback: bool) -> None:
    """By name or number, without resolving names."""
    assert Address.parse(f"{host}:80").is_loopback is loopback


@pytest.mark.parametrize(
    "text",
    [
        "",
        "80",
        ":80",
        "999.1.1.1:3",
        "-:1",
        "h\u00e9llo:5",
        "[::zz]:1",
        "host",
        "host:",
        "host:-1",
        "::1:80",
        "a b:80",
        "http://x:80",
        "x:\uff18\uff10",
    ],
)
def test_invalid_address_raises(text: str) -> None:
    """Text that is not host:port is not accepted."""
    with pytest.raises(ValueError, match=r"host:port|no port"):
        Address.parse(text)


@pytest.mark.parametrize(
    ("spelling", "meant"),
    [
        ("bf16", "bfloat16"), ("bf16-mixed", "bfloat16"), ("BF16", "bfloat16"), ("fp16", "float16"),
        ("16-mixed", "float16"), ("no", "off"), ("32", "off"), ("fp32", "off"), ("false", "off"), ("auto", "auto"),
        ("off", "off"),
    ],
)  # fmt: skip
def test_common_spellings_of_precisions_are_accepted(spelling: str, meant: str) -> None:
    """As PyTorch, Lightning and Accelerate have them."""
    assert load_settings(None, [f"fastpaths.amp={spelling}"]).fastpaths.amp == meant


@pytest.mark.parametrize("spelling", ["bf16-true", "fp8", "64", "mixed"])
def test_other_precisions_are_refused_with_the_list(spelling: str) -> None:
    """They are none of mixed precision."""
    with pytest.raises(ConfigurationError, match=r"fastpaths.amp.*'auto', 'bfloat16', 'float16' or 'off'"):
        load_settings(None, [f"fastpaths.amp={spelling}"])


def test_enumerated_settings_list_their_values() -> None:
    """In `config show`, below the description."""
    text = as_toml(Settings())
    assert '# Values: constant, cosine, step\npolicy = "constant"' in text
    assert '# Values: auto, bfloat16, float16, off\namp = "off"' in text
    assert text.count("# Values: ") > 15
