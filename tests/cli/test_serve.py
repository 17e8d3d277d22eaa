"""``hotset serve``: what it takes from where."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import hotset

import hotset.gateway.server as server
from hotset.gateway.server import ServerConfig
from hotset.scheduling.policies.interface import PolicySettings


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ServerConfig]:
    """The configurations that servers would have been started with."""
    configs: list[ServerConfig] = []

    def fake_serve(config: ServerConfig, *, ready: object) -> None:
        configs.append(config)
        assert callable(ready)
        ready(f"http://{config.host}:{config.port}")

    monkeypatch.setattr(server, "serve", fake_serve)
    return configs


def test_flags_beat_the_environment_which_beats_the_file(
    started: list[ServerConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "hotset.toml"
    file.write_text('policy = "lb"\nport = 1111\no3-limit = 7\ngpu-memory = "1GiB"\n')
    monkeypatch.setenv("HOTSET_PORT", "2222")
    monkeypatch.setenv("HOTSET_POLICY", "lalb")
    result = hotset("serve", "--config", str(file), "--policy", "lalb_o3", "--data-dir", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert (started[0].policy, started[0].port, started[0].o3_limit) == ("lalb_o3", 2222, 7)
    assert started[0].gpu_memory_bytes == 1 << 30
    assert "hotset serves at http://127.0.0.1:2222" in result.output


def test_what_policies_read_can_be_set(started: list[ServerConfig]) -> None:
    assert hotset("serve").exit_code == 0
    assert hotset("serve", "--max-skips", "5", "--max-wait", "3s", "--overrun", "500ms").exit_code == 0
    settings = [(each.max_skips, each.max_wait_s, each.overrun_s) for each in started]
    assert settings == [
        (PolicySettings().max_skips, PolicySettings().max_wait_s, PolicySettings().overrun_s),
        (5, 3, 0.5),
    ]


def test_it_listens_on_loopback_and_keeps_data_where_a_user_would_look(
    started: list[ServerConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert '"url"' in hotset("serve", "--json").output
    assert started[0].host == "127.0.0.1"
    assert started[0].data == tmp_path / "hotset"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("polcy = 1\n", "there is no setting 'polcy'"), ("policy = \n", "cannot be read as TOML")],
)
def test_a_configuration_file_with_a_mistake_is_refused(
    started: list[ServerConfig], tmp_path: Path, text: str, sentence: str
) -> None:
    file = tmp_path / "hotset.toml"
    file.write_text(text)
    result = hotset("serve", "--config", str(file))
    assert result.exit_code == 2
    assert sentence in result.output
    assert not started
