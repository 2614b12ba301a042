"""An archive on a Ray cluster of two nodes on this machine; what goes wrong there."""

import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from sailer.cli import main
from sailer.inference import archive_ray
from sailer.inference.archive import Archive

from .sounds import noise

ray = pytest.importorskip("ray", reason="the engine needs Ray Data (the ray extra)")
cluster_utils = pytest.importorskip("ray.cluster_utils")

pytestmark = pytest.mark.slow

# A busy machine of two cores starts Ray's processes slowly.
PATIENCE = {
    "RAY_raylet_start_wait_time_s": "120",
    "RAY_agent_register_timeout_ms": "120000",
    "RAY_gcs_server_request_timeout_seconds": "120",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "120",
    "RAY_health_check_initial_delay_ms": "60000",
}


def node() -> dict[str, Any]:
    """One CPU, and ports for its agents: the node then waits for no file in which they tell theirs."""
    names = ("metrics_agent_port", "runtime_env_agent_port", "dashboard_agent_listen_port", "metrics_export_port")
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in names]
        for found in sockets:
            found.bind(("", 0))
        ports = {name: found.getsockname()[1] for name, found in zip(names, sockets, strict=True)}
    return {"num_cpus": 1, "object_store_memory": 80_000_000, **ports}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in PATIENCE.items():
            patch.setenv(name, value)
        started = cluster_utils.Cluster(initialize_head=True, head_node_args={"include_dashboard": False, **node()})
        ray.init(address=started.address, log_to_driver=False)
        yield started
        ray.shutdown()
        started.shutdown()


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    (tmp_path / "clips").mkdir()
    for index in range(12):
        soundfile.write(tmp_path / "clips" / f"clip{index:02d}.wav", noise(0.3 + 0.05 * index, seed=index), 16000)
    (tmp_path / "clips" / "clip05.wav").write_bytes(b"RIFF no audio")
    return tmp_path / "clips"


def test_a_node_that_is_killed_loses_nothing_and_doubles_nothing(
    cluster: Any, clips: Path, tiny_speech_sailer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = cluster.add_node(**node())
    cluster.wait_for_nodes()
    write, killed, victim = Archive.write, [], other.node_id

    class Slow(archive_ray.Actor):
        """On the node that is to be killed it never ends its second part; on the other it waits for the first one."""

        def _row(self, part: int) -> dict[str, Any]:
            row, place = super()._row(part), tmp_path / "other"
            if ray.get_runtime_context().get_node_id() == victim:
                place.mkdir(exist_ok=True)
                time.sleep(300 if list(place.iterdir()) else 0)
                (place / str(part)).touch()
            end = time.monotonic() + 60
            while not (place.is_dir() and list(place.iterdir())) and time.monotonic() < end:
                time.sleep(0.1)
            return row

    def kill(self: Archive, part: int, tables: dict) -> None:
        write(self, part, tables)
        if not killed and (tmp_path / "other").is_dir() and any((tmp_path / "other").iterdir()):
            killed.append(part)
            cluster.remove_node(other, allow_graceful=False)

    monkeypatch.setattr(archive_ray, "Actor", Slow)
    monkeypatch.setattr(Archive, "write", kill)
    command = ["predict", str(tiny_speech_sailer), f"file://{clips}", "--engine", "ray", "--actors", "2"]
    command += ["--output", str(tmp_path / "ray.parquet"), "--part_size", "1"]
    assert main(command) == 1  # one is no audio
    assert killed and list((tmp_path / "other").iterdir())
    assert main(["predict", str(tiny_speech_sailer), str(clips), "--output", str(tmp_path / "one.parquet")]) == 1
    ours, theirs = pq.read_table(tmp_path / "ray.parquet"), pq.read_table(tmp_path / "one.parquet")
    assert ours["file"].to_pylist() == [f"file://{clips}/clip{index:02d}.wav" for index in range(12)]
    assert ours.column_names == theirs.column_names
    np.testing.assert_allclose(ours["Angry"].to_numpy(), theirs["Angry"].to_numpy(), atol=1e-5)
    assert (ours["error"].is_valid().to_pylist()) == [index == 5 for index in range(12)]


def test_rows_of_parquet_are_judged_on_the_cluster_and_a_finished_run_is_left(
    cluster: Any, clips: Path, tiny_speech_sailer: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shard = tmp_path / "shard.parquet"
    pq.write_table(pa.table({"audio": [path.read_bytes() for path in sorted(clips.iterdir())[:4]]}), shard)
    command = ["predict", str(tiny_speech_sailer), str(shard), "--output", str(tmp_path / "out.parquet")]
    for _ in range(2):
        assert main([*command, "--engine", "ray", "--part_size", "2"]) == 0
    files = pq.read_table(tmp_path / "out.parquet")["file"].to_pylist()
    assert files == [f"{shard}#{row}" for row in range(4)]
    assert capsys.readouterr().out.splitlines()[-1] == f"Result: {tmp_path / 'out.parquet'}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cuda"], r"--device cuda asks for a GPU, and the Ray cluster has none \(\d CPUs\)"),
        (["--device", "mps"], "on a Ray cluster it is cpu or cuda"),
        (["--actors", "0"], "actors is 0"),
        (
            ["--precision", "float64", "--dtype", "float32"],
            "Part 0 .* cannot be judged on the cluster: Pred",
        ),
    ],
)
def test_what_the_cluster_cannot_do(
    cluster: Any,
    options: list[str],
    message: str,
    clips: Path,
    tiny_speech_sailer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    command = ["predict", str(tiny_speech_sailer), str(clips), "--output", str(tmp_path / "out.parquet")]
    assert main([*command, "--engine", "ray", *options]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out.parquet").exists()
