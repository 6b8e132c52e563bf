"""Downloaded files are complete and checked, whatever the server and the network do."""

import filecmp
import os
import resource
import ssl
import stat
import subprocess
import sys
import time
import zipfile
from functools import partial

import pytest

from heartseg.datasets import camus, girder_client
from heartseg.datasets.girder_client import DamagedDownload
from heartseg.datasets.phantom import write_phantom
from heartseg.errors import UserError
from heartseg.storage import locks
from helpers.experiments import ROOT
from helpers.girder_server import GirderServer, zip_of
from helpers.job_process import wait_for
from jobs import download

PATIENTS = ["patient0001", "patient0002", "patient0003"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> str:
    """The server's data: three synthetic patients with sequences."""
    folder = str(tmp_path_factory.mktemp("served"))
    write_phantom(folder, patients=3, scale=0.1, sequences=True)
    return folder


@pytest.fixture
def server(tree, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    with GirderServer(tree) as running:
        yield running
        running.shutdown()


@pytest.fixture
def out(tmp_path) -> str:
    return str(tmp_path / "CAMUS")


def fetch(running: GirderServer, folder: str, **changes) -> str:
    settings = {"out": folder, "server": running.base, "accept_licence": True, "wait_s": 0.01, "tries": 3}
    return download.run(download.Options(**settings | changes))


def command(out: str, running: GirderServer) -> list[str]:
    line = [sys.executable, str(ROOT / "jobs" / "download.py"), "--out", out, "--accept-licence"]
    return [*line, "--server", running.base]


def assert_same(tree: str, out: str, patients: list[str]) -> None:
    """Exactly these patients and the split exist, byte for byte."""
    assert sorted({*os.listdir(out), ".heartseg.lock"}) == [".heartseg.lock", "camus.json", "database_nifti", "database_split"]
    assert sorted(os.listdir(os.path.join(out, "database_nifti"))) == patients
    for folder in ["database_split", *(f"database_nifti/{patient}" for patient in patients)]:
        names = sorted(os.listdir(os.path.join(tree, folder)))
        assert sorted(os.listdir(os.path.join(out, folder))) == names
        same, _, _ = filecmp.cmpfiles(os.path.join(tree, folder), os.path.join(out, folder), names, shallow=False)
        assert same == names


def test_the_tree_that_arrives_is_the_servers_and_is_what_preprocess_reads(server, tree, out, capsys):
    fetch(server, out)
    assert_same(tree, out, PATIENTS)
    assert camus.find_patients(out) == PATIENTS and camus.CamusTree(out).groups() == camus.CamusTree(tree).groups()
    assert camus.CamusTree(out).dataset_name() == "CAMUS"
    assert server.count("list") == 3  # two pages of at most two, and an empty one
    assert "non-commercial" in capsys.readouterr().out


def test_only_what_is_asked_for_and_missing_is_fetched(server, tree, out):
    fetch(server, out, patients="2-3")
    assert_same(tree, out, PATIENTS[1:3])
    fetch(server, out, patients="1,3")
    assert_same(tree, out, PATIENTS)
    assert server.count("patient0003") == 1
    server.requests.clear()
    fetch(server, out)
    assert set(server.requests) == {"list"}


FAULTS = ["cut", "long", "short", 500, 503, 429, "silent", b"<html>busy</html>", zip_of({"patient0002/x.txt": b"x"})]


def test_transient_faults_of_every_kind_are_retried(server, tree, out):
    server.faults = {"patient0002": FAULTS.copy(), "list": ["cut", 500, b'{"a": 1}']}
    fetch(server, out, patients="1-2", timeout_s=0.3, tries=1 + len(FAULTS), wait_s=0.0)
    assert_same(tree, out, PATIENTS[:2])
    assert server.count("patient0002") == 1 + len(FAULTS) and server.count("patient0001") == 1


def changed_zip(server: GirderServer, patient: str, **changes: bytes | None) -> bytes:
    """A patient's zip with some files changed, or left out for None; keys are file names without the patient."""
    files = server.files_of(patient) | {f"{patient}/{patient}_{name}.nii.gz": data for name, data in changes.items()}
    return zip_of({name: data for name, data in files.items() if data is not None})


def test_damaged_patients_are_named_at_the_end_the_others_are_there_and_a_missing_sequence_is_noted(server, tree, out, capsys):
    packed = bytearray(zip_of(server.files_of("patient0001")))
    packed[len(packed) // 2] ^= 255  # amid its pixels
    server.faults["patient0001"] = [bytes(packed)] * 3 + [changed_zip(server, "patient0001", **{"2CH_ES_gt": None})] * 3
    server.faults["patient0002"] = changed_zip(server, "patient0002", **{"2CH_half_sequence": None})
    server.faults["patient0003"] = changed_zip(server, "patient0003", **{"4CH_half_sequence_gt": b"no picture"})
    with pytest.raises(UserError, match=r"2 of 4 folders could not be fetched \(patient0001, patient0003\): rerun"):
        fetch(server, out)
    assert camus.find_patients(out) == ["patient0002"] and server.count("patient0001") == 3
    with pytest.raises(UserError, match=r"could not be fetched \(patient0001\)"):
        fetch(server, out, patients="1-2")
    printed = capsys.readouterr().out
    assert "failed  patient0001: sends a damaged zip" in printed
    assert "failed  patient0003: arrives with patient0003_4CH_half_sequence_gt.nii.gz, which is" in printed
    assert "failed  patient0001: arrives without patient0001_2CH_ES_gt.nii.gz" in printed
    assert "patient0002 has no patient0002_2CH_half_sequence.nii.gz on the server" in printed
    server.faults.clear()
    fetch(server, out)
    assert server.count("patient0002") == 1 and camus.find_patients(out) == PATIENTS


@pytest.mark.parametrize(("name", "data"), [("testing", b"../../etc\n"), ("validation", b"\xff\xfe\xff"), ("training", b"")])
def test_a_split_that_lists_anything_but_patients_is_refused(name, data, server, out):
    files = server.files_of("database_split") | {f"database_split/subgroup_{name}.txt": data}
    server.faults["database_split"] = zip_of(files)
    with pytest.raises(UserError, match="database_split"):
        fetch(server, out, patients="1")
    assert not os.path.exists(os.path.join(out, "database_split"))


def test_a_server_that_is_down_is_not_flooded_with_requests_or_reported_as_damage(server, out, monkeypatch, capsys):
    monkeypatch.setattr(download, "MAX_FAILED_IN_A_ROW", 2)
    server.faults |= {"patient0001": 500, "patient0002": "silent"}
    with pytest.raises(UserError, match="2 folders in a row failed, the last being patient0002"):
        fetch(server, out, timeout_s=0.2)
    printed = capsys.readouterr().out
    assert "patient0001: returns 500 Internal Server Error" in printed
    assert "patient0002: cannot be reached (Read timed" in printed
    assert [server.count(patient) for patient in PATIENTS] == [3, 3, 0]


def test_a_kill_in_the_middle_loses_no_finished_patient_and_leaves_no_half_one(server, tree, out):
    server.pause_s = 0.5
    first = subprocess.Popen(command(out, server), stdout=subprocess.DEVNULL)
    wait_for(lambda: server.count("patient0002"), first)
    time.sleep(0.1)  # amid the second patient's bytes
    first.kill()
    first.wait()
    assert sorted(os.listdir(os.path.join(out, "database_nifti"))) == PATIENTS[:1]
    # What a kill during the unpacking leaves.
    girder_client.unpack(changed_zip(server, "patient0002", stray=b"half"), os.path.join(out, ".download", "database_nifti"))
    server.pause_s = 0.0
    again = subprocess.run(command(out, server), capture_output=True, text=True, timeout=60)
    assert again.returncode == 0 and again.stdout.splitlines()[-1].endswith(f"--source {out} --out SHARDS")
    assert_same(tree, out, PATIENTS)
    assert [server.count(patient) for patient in PATIENTS] == [1, 2, 1]


def test_a_folder_that_lacks_a_file_or_that_another_job_writes_is_named_and_never_overwritten(server, out, capsys):
    fetch(server, out, patients="1")
    folder = os.path.join(out, "database_nifti", "patient0001")
    os.remove(os.path.join(folder, "patient0001_2CH_ED.nii.gz"))
    with locks.lock(out), pytest.raises(UserError, match="Another job is writing"):
        fetch(server, out, patients="1")
    with pytest.raises(UserError, match="patient0001"):
        fetch(server, out, patients="1")
    assert "already exists but lacks patient0001_2CH_ED.nii.gz: move it away" in capsys.readouterr().out
    assert server.count("patient0001") == 1 and len(os.listdir(folder)) == 13


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accept_licence": False}, "--accept-licence"),
        ({"out": ""}, "--out is missing"),
        ({"out": "s3://bucket/x"}, "not a local folder"),
        ({"patients": "3-1"}, "--patients 3-1 is not a list"),
        ({"patients": "3-5"}, "no patient 4: choose from its 3 patients, patient0001 to patient0003"),
        ({"server": "ftp://x"}, "ftp://x cannot be reached .*check the network and --server"),
        ({"tries": 0}, "--tries"),
        ({"server": "http://127.0.0.1:9/api"}, "127.0.0.1:9/api cannot be reached .*refused"),
        ({"server": "http://no-such-host.invalid/api"}, "cannot be reached .*no-such-host.*check the network"),
        ({"server": "http://" + "a" * 70 + "/"}, "cannot be reached"),
    ],
)
def test_a_mistake_is_a_one_line_message_that_names_it(changes, message, server, out):
    with pytest.raises(UserError, match=message) as caught:
        fetch(server, out, **changes)
    assert "\n" not in str(caught.value) and "object at 0x" not in str(caught.value)
    assert set(server.requests) <= {"list"}


def test_a_server_with_other_folders_is_refused_and_a_listing_that_repeats_itself_ends(server, out):
    server.faults["list"] = b'[{"_id": "0", "name": "patientX"}]'
    with pytest.raises(UserError, match="lists no patient"):
        fetch(server, out)
    assert server.count("list") == 2


def test_a_rejected_certificate_is_reported_and_not_retried(server, out, tmp_path):
    key, certificate = str(tmp_path / "key"), str(tmp_path / "certificate")
    line = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost -keyout"
    subprocess.run([*line.split(), key, "-out", certificate], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"The certificate of https://127.*was rejected \(self.signed.*REQUESTS_CA_BUNDLE"):
        fetch(server, out, server=server.base.replace("http:", "https:"), wait_s=30.0)
    assert time.monotonic() - started < 10


def test_a_full_disk_is_reported_and_what_is_complete_stays(server, tree, out):
    fetch(server, out, patients="1")
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (5000, 5000))
    done = subprocess.run(command(out, server), capture_output=True, text=True, timeout=60, preexec_fn=limit)
    assert done.returncode == 2 and "cannot be written (File too large): free up space" in done.stderr
    assert "Traceback" not in done.stderr and server.count("patient0002") == 1
    assert_same(tree, out, PATIENTS[:1])
    fetch(server, out)
    assert_same(tree, out, PATIENTS)


def test_no_zip_entry_is_written_outside_the_folder(tmp_path):
    link = zipfile.ZipInfo("p/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    names = ["p/good", "../evil", "p/../../evil", str(tmp_path / "evil"), "C:/evil", "p\\..\\..\\evil"]
    target = tmp_path / "a" / "target"
    girder_client.unpack(zip_of(dict.fromkeys(names, b"x") | {link: str(tmp_path).encode(), "p/link2/x": b"x"}), str(target))
    assert os.listdir(tmp_path) == ["a"] and os.listdir(tmp_path / "a") == ["target"]
    assert (target / "p" / "good").read_bytes() == b"x" and not (target / "p" / "link").is_symlink()


def test_a_zip_that_unpacks_to_more_than_a_patient_can_be_is_refused(tmp_path, monkeypatch, server, out, capsys):
    monkeypatch.setattr(girder_client, "MAX_BYTES", 1000)
    packed = zip_of({"p/zeros": bytes(2000)})
    # One that claims less than it holds: no more is written than it claims.
    for bomb in (packed, packed.replace((2000).to_bytes(4, "little"), (900).to_bytes(4, "little"))):
        with pytest.raises(DamagedDownload, match="sends a"):
            girder_client.unpack(bomb, str(tmp_path / "target"))
    assert sum(path.stat().st_size for path in tmp_path.rglob("zeros")) <= 900
    with pytest.raises(UserError, match="could not be fetched"):
        fetch(server, out, patients="1")
    assert "failed  patient0001: sends more than 1000 bytes" in capsys.readouterr().out
