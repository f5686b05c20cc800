"""The same units on a Ray cluster of two nodes, one of which dies midway."""

import dataclasses
import lzma
import threading

import pytest

from data_prep.errors import UserError
from data_prep.prepare import PrepareRequest, prepare
from data_prep.readers.sources import Source
from tests.read import files_of

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster():
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 200 << 20}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    yield cluster, cluster.add_node(**node)
    cluster.shutdown()


@pytest.fixture
def request_(samples, tmp_path):
    """A plain source and a compressed stream, in many small units."""
    with lzma.open(tmp_path / "fr.txt.xz", "wb", preset=1) as file:
        file.write(samples.leads("fr").read_bytes().replace(b"\n", b"\n\n"))
    kinds = (f"jsonl,language=en:{samples.leads('en')}", f"cc100:{tmp_path / 'fr.txt.xz'}")
    return PrepareRequest(
        tokenizer=str(samples.teacher),
        sources=tuple(map(Source.parse, kinds)),
        validation_fraction=0.05,
        unit_bytes=60_000,
        shard_bytes=500_000,
    )


def test_a_node_dies_midway_and_the_result_is_the_same(cluster, request_, tmp_path):
    head, node = cluster
    out = tmp_path / "ray"
    killed = threading.Event()

    def kill_when_half_done():
        while len(list(out.glob(".work/parts/*/*.json"))) < 40:
            if killed.wait(0.02):
                return
        head.remove_node(node, allow_graceful=False)
        killed.set()

    killer = threading.Thread(target=kill_when_half_done)
    killer.start()
    try:
        prepare(request_, out, engine="ray", ray_address=head.address, show_progress=False)
    finally:
        was_killed = killed.is_set()
        killed.set()
        killer.join()
    assert was_killed
    prepare(request_, tmp_path / "local", workers=0, show_progress=False)
    assert files_of(out) == files_of(tmp_path / "local")


def test_a_bad_record_is_reported_as_on_one_machine(cluster, request_, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\nnot json\n')
    request = dataclasses.replace(request_, sources=(Source.parse(f"jsonl:{tmp_path / 'bad.jsonl'}"),))
    with pytest.raises(UserError, match="^bad record in .*bad.jsonl, line 2"):
        prepare(request, tmp_path / "c", engine="ray", ray_address=cluster[0].address, show_progress=False)


def test_no_cluster_there(request_, tmp_path):
    with pytest.raises(UserError, match="no Ray cluster at '127.0.0.1:1'"):
        prepare(request_, tmp_path / "c", engine="ray", ray_address="127.0.0.1:1", show_progress=False)
