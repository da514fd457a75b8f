"""The files that `brim ps` reads, and the address a server takes."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest

from brim.config.schema import ServerConfig
from brim.errors import ConfigError
from brim.server.http_server import listen, url_of
from brim.server.instances import InstanceFile, instances_folder, list_instances


def test_a_server_is_listed_until_it_closes(tmp_path: Path) -> None:
    folder = tmp_path / "brim"
    file = InstanceFile.open("demo", "http://x:1", folder)
    assert file is not None
    (path,) = folder.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (instance,) = list_instances(folder)
    assert (instance.name, instance.url, instance.state) == ("demo", "http://x:1", "starting")
    assert len(instance.key) > 20
    file.set_state("serving")
    assert [one.state for one in list_instances(folder)] == ["serving"]
    assert instance.uptime_s < 5
    file.close()
    assert list_instances(folder) == []


def test_what_a_crash_left_is_removed_and_nonsense_is_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "brim"
    file = InstanceFile.open("demo", "http://x:1", folder)
    assert file is not None
    (path,) = folder.iterdir()
    left = folder / "1-left.json"
    left.write_bytes(path.read_bytes())
    (folder / "2-empty.json").touch()
    assert [one.pid for one in list_instances(folder)] == [file.instance.pid]
    assert not left.exists()
    file.close()


def test_a_folder_that_others_may_write_is_not_trusted(tmp_path: Path) -> None:
    folder = tmp_path / "brim"
    folder.mkdir()
    folder.chmod(0o777)
    assert list_instances(folder) == []
    assert InstanceFile.open("demo", "http://x:1", folder) is None
    assert list_instances(tmp_path / "none") == []


def test_the_folder_is_the_users_own() -> None:
    assert instances_folder({"XDG_RUNTIME_DIR": "/run/user/7"}) == Path("/run/user/7/brim")
    assert instances_folder({}).name.startswith("brim-")


def test_port_0_is_any_free_one() -> None:
    with listen(ServerConfig(port=0)) as listener:
        port = listener.getsockname()[1]
        assert port > 0
        assert url_of("127.0.0.1", listener) == url_of("0.0.0.0", listener) == f"http://127.0.0.1:{port}"
        assert url_of("::", listener) == f"http://[::1]:{port}"


def test_two_servers_that_start_at_once_do_not_share_a_port() -> None:
    """Neither serves yet: binding alone would let both through, and one would fail after its model was loaded."""
    with listen(ServerConfig(port=0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"{port}: another program has it"):
            listen(ServerConfig(port=port))


def test_addresses_that_cannot_be_used_name_their_flag() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="another program has it; give another with --port, or --port 0"):
            listen(ServerConfig(port=taken.getsockname()[1]))
    for host in ("no.such.host.invalid", "192.0.2.1", "not a host"):
        with pytest.raises(ConfigError, match="--host"):
            listen(ServerConfig(host=host, port=0))
