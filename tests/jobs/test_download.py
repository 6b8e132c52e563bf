"""What the download leaves on the disk is whole and checked, whatever the server and the network do."""

import contextlib
import filecmp
import os
import signal
import stat
import subprocess
import sys
import time
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heartseg.datasets import camus, girder_client
from heartseg.datasets.girder_client import FailedDownload
from heartseg.datasets.phantom import write_phantom
from heartseg.errors import UserError
from helpers.experiments import ROOT
from helpers.girder_server import GirderServer, zip_of
from jobs import download

PATIENTS = ["patient0001", "patient0002", "patient0003"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> str:
    """Three synthetic patients with sequences: what the server has."""
    folder = str(tmp_path_factory.mktemp("served"))
    write_phantom(folder, patients=3, scale=0.25, sequences=True)
    return folder


@pytest.fixture
def server(tree, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "*")
    running = GirderServer(tree)
    yield running
    running.shutdown()
    running.server_close()


@pytest.fixture
def out(tmp_path) -> str:
    return str(tmp_path / "CAMUS")


def fetch(running: GirderServer, folder: str, **changes) -> str:
    settings = {"out": folder, "server": running.base, "accept_licence": True, "wait_s": 0.01, "tries": 3}
    return download.run(download.Options(**settings | changes))


def assert_same(tree: str, out: str, patients: list[str]) -> None:
    """These patients and the split are there byte for byte, and nothing else is."""
    assert [name for name in sorted(os.listdir(out)) if name != ".heartseg.lock"] == ["database_nifti", "database_split"]
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
    assert server.count("list") == 3  # two pages of at most two, and an empty one
    assert "non-commercial" in capsys.readouterr().out


def test_the_same_command_fetches_nothing_again(server, out):
    fetch(server, out)
    server.requests.clear()
    fetch(server, out)
    assert set(server.requests) == {"list"}


def test_some_patients_can_be_asked_for(server, tree, out):
    fetch(server, out, patients="2-3")
    assert_same(tree, out, PATIENTS[1:3])
    fetch(server, out, patients="1,3")
    assert_same(tree, out, PATIENTS[:3])
    assert server.count("patient0003") == 1


FAULTS = ["cut", "long", "short", 500, 503, 429, "silent", b"", b"<html>busy</html>", zip_of({"patient0002/x.txt": b"x"})]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault if isinstance(fault, str) else repr(fault)[:12])
def test_a_passing_fault_is_tried_again(fault, server, tree, out):
    server.faults["patient0002"] = [fault]
    fetch(server, out, patients="1-2", timeout_s=1.0)
    assert_same(tree, out, PATIENTS[:2])
    assert server.count("patient0002") == 2 and server.count("patient0001") == 1


@pytest.mark.parametrize("fault", ["cut", 500, 429, b"no json", b'{"a": 1}', b"[1]"], ids=repr)
def test_a_listing_that_fails_once_is_tried_again(fault, server, tree, out):
    server.faults["list"] = [fault]
    fetch(server, out, patients="1")
    assert_same(tree, out, PATIENTS[:1])


def damaged_zip(server: GirderServer, patient: str, **changes: bytes | None) -> bytes:
    """A patient's zip with some files changed, or left out for None; `_` in a key's place stands for the patient's name."""
    files = server.files_of(patient)
    for name, data in changes.items():
        path = f"{patient}/{patient}_{name.strip('_')}.nii.gz"
        files = {key: value for key, value in files.items() if key != path} if data is None else files | {path: data}
    return zip_of(files)


def flipped(data: bytes) -> bytes:
    """A zip with a byte changed in the middle of its pixels."""
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 255]) + data[len(data) // 2 + 1 :]


def test_a_damaged_patient_is_named_at_the_end_and_the_others_are_there(server, tree, out, capsys):
    server.faults["patient0001"] = flipped(zip_of(server.files_of("patient0001")))
    server.faults["patient0003"] = damaged_zip(server, "patient0003", _4CH_half_sequence_gt=b"no picture")
    with pytest.raises(UserError, match=r"2 of 4 folders did not arrive \(patient0001, patient0003\): the same command"):
        fetch(server, out)
    assert_same(tree, out, PATIENTS[1:2])
    said = capsys.readouterr().out
    assert "failed  patient0001: sends a damaged zip" in said
    assert "failed  patient0003: arrives with patient0003_4CH_half_sequence_gt.nii.gz, which is no readable NIfTI" in said
    assert server.count("patient0001") == 3
    server.faults.clear()
    fetch(server, out)
    assert_same(tree, out, PATIENTS)
    assert server.count("patient0002") == 1


def test_a_patient_without_a_still_is_refused_and_one_without_a_sequence_is_noted(server, out, capsys):
    server.faults["patient0001"] = damaged_zip(server, "patient0001", _2CH_ES_gt=None)
    server.faults["patient0002"] = damaged_zip(server, "patient0002", _2CH_half_sequence=None)
    with pytest.raises(UserError, match=r"did not arrive \(patient0001\)"):
        fetch(server, out, patients="1-2")
    said = capsys.readouterr().out
    assert "patient0001: arrives without patient0001_2CH_ES_gt.nii.gz" in said
    assert "patient0002 has no patient0002_2CH_half_sequence.nii.gz on the server" in said
    assert camus.find_patients(out) == ["patient0002"]


def test_a_split_that_lists_anything_but_patients_is_refused(server, out, capsys):
    files = server.files_of("database_split")
    for name, data in (("testing", b"../../etc\n"), ("validation", b"\xff\xfe"), ("training", b"")):
        server.faults["database_split"] = zip_of(files | {f"database_split/subgroup_{name}.txt": data})
        with pytest.raises(UserError, match="database_split"):
            fetch(server, out, patients="1")
        assert not os.path.exists(os.path.join(out, "database_split"))


def test_many_failures_one_after_the_other_leave_the_server_in_peace(server, out, monkeypatch):
    monkeypatch.setattr(download, "MAX_FAILED_IN_A_ROW", 2)
    server.faults |= {"patient0001": 500, "patient0002": "cut"}
    with pytest.raises(UserError, match="2 folders failed one after the other, last patient0002"):
        fetch(server, out)
    assert server.count("patient0003") == 0


def test_a_kill_in_the_middle_loses_no_finished_patient(server, tree, out):
    server.pause_s = 0.05
    command = [sys.executable, str(ROOT / "jobs" / "download.py"), "--out", out, "--accept-licence", "--server", server.base]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while server.count("patient0002") == 0 and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.1)  # amid the second patient's bytes
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert sorted(os.listdir(os.path.join(out, "database_nifti"))) == PATIENTS[:1]
    assert os.path.exists(os.path.join(out, ".download"))
    server.pause_s = 0.0
    again = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert again.returncode == 0 and again.stdout.splitlines()[-1].endswith(f"--source {out} --out SHARDS")
    assert_same(tree, out, PATIENTS)
    assert [server.count(patient) for patient in PATIENTS] == [1, 2, 1]


def test_a_folder_that_lacks_a_file_is_named_and_never_overwritten(server, out, capsys):
    fetch(server, out, patients="1")
    folder = os.path.join(out, "database_nifti", "patient0001")
    os.remove(os.path.join(folder, "patient0001_2CH_ED.nii.gz"))
    with pytest.raises(UserError, match="patient0001"):
        fetch(server, out, patients="1")
    assert "is there and lacks patient0001_2CH_ED.nii.gz: move it away" in capsys.readouterr().out
    assert server.count("patient0001") == 1 and len(os.listdir(folder)) == 13


def test_two_downloads_into_one_folder_are_refused(server, out):
    from heartseg.storage import locks

    with locks.lock(out), pytest.raises(UserError, match="Another job is writing"):
        fetch(server, out)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"accept_licence": False}, "--accept-licence"),
        ({"out": ""}, "--out is missing"),
        ({"out": "s3://bucket/x"}, "no local folder"),
        ({"patients": "3-1"}, "--patients 3-1 is no list"),
        ({"patients": "one"}, "--patients one is no list"),
        ({"patients": "3-5"}, "no patient 4: its 3 are patient0001 to patient0003"),
        ({"server": "ftp://x"}, "'ftp://x' is no address"),
        ({"tries": 0}, "--tries"),
        ({"server": "http://127.0.0.1:9/api"}, "127.0.0.1:9/api cannot be reached .*refused"),
        ({"server": "http://no-such-host.invalid/api"}, "cannot be reached .*no-such-host.*check the network"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_it(changes, said, server, out):
    with pytest.raises(UserError, match=said) as caught:
        fetch(server, out, **changes)
    assert "\n" not in str(caught.value) and "object at 0x" not in str(caught.value)
    assert set(server.requests) <= {"list"}


def test_a_server_that_has_other_things_is_refused(server, out):
    server.ids = {f"{number:024x}": name for number, name in enumerate(["notes", "patientX"])}
    with pytest.raises(UserError, match="lists no patient"):
        fetch(server, out)
    server.ids = {"../../token": "patient0001"}
    with pytest.raises(UserError, match="ids that are none"):
        fetch(server, out)


def test_a_listing_that_repeats_itself_for_ever_ends(server, out):
    server.faults["list"] = b'[{"_id": "000000000000000000000000", "name": "patient0001"}]'
    fetch(server, out)
    assert camus.find_patients(out) == ["patient0001"] and server.count("list") == 2


def test_a_refused_certificate_is_said_and_not_tried_again(server, out, tmp_path):
    import ssl

    key, certificate = str(tmp_path / "key"), str(tmp_path / "certificate")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    command += ["-keyout", key, "-out", certificate, "-subj", "/CN=localhost"]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"The certificate of https://127.*is refused .*REQUESTS_CA_BUNDLE"):
        fetch(server, out, server=server.base.replace("http:", "https:"), wait_s=30.0)
    assert time.monotonic() - started < 10


def test_a_disk_that_takes_no_more_is_said_and_what_is_complete_stays(server, tree, out):
    fetch(server, out, patients="1")
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        f"sys.argv = ['download.py', *sys.argv[1:]]; sys.path.insert(0, {str(ROOT)!r});"
        "from jobs import download; from jobs.support import command_line; command_line.main(download.job)"
    )
    command = [sys.executable, "-c", program, "--out", out, "--accept-licence", "--server", server.base]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and f"{out} cannot be written (File too large): make room" in done.stderr
    assert "Traceback" not in done.stderr and server.count("patient0002") == 1
    assert_same(tree, out, PATIENTS[:1])
    fetch(server, out)
    assert_same(tree, out, PATIENTS)


def write_zip(path: str, *entries: tuple[zipfile.ZipInfo | str, bytes]) -> str:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for entry, data in entries:
            archive.writestr(entry, data)
    return path


def special(name: str, kind: int = stat.S_IFLNK) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = (kind | 0o777) << 16
    return entry


EVIL = {
    "climbs": [("p/good.txt", b"x"), ("../evil", b"x")],
    "climbs inside": [("p/../../evil", b"x")],
    "absolute": [("/tmp/heartseg-evil", b"x")],
    "drive": [("C:/evil", b"x")],
    "backslash": [("p\\..\\..\\evil", b"x")],
    "link": [(special("p/evil"), b"/etc/passwd")],
    "through a link": [(special("p/sub"), b"/tmp"), ("p/sub/heartseg-evil", b"x")],
    "device": [(special("p/null", stat.S_IFCHR), b"")],
    "twice": [("p/a", b"x"), ("a", b"y")],
    "file and folder": [("p/a", b"x"), ("p/a/b", b"y")],
    "a very long name": [("p/" + "a" * 5000, b"x")],
    "many files": [(f"p/{number}", b"") for number in range(girder_client.MAX_ENTRIES + 1)],
}


def listing(folder) -> set[str]:
    return {os.path.join(where, name) for where, _, names in os.walk(folder) for name in names}


@pytest.mark.parametrize("kind", EVIL)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_evil_zip_is_refused_and_nothing_is_written_outside(kind, tmp_path):
    target = tmp_path / "a" / "b" / "target"
    path = write_zip(str(tmp_path / "evil.zip"), *EVIL[kind])
    with pytest.raises(FailedDownload) as caught:
        girder_client.unpack(path, str(target), "p")
    assert not caught.value.passing and len(str(caught.value)) < 300
    outside = {name for name in listing(tmp_path) if not name.startswith(str(target))}
    assert outside == {path} and not os.path.exists("/tmp/heartseg-evil")


def test_an_evil_zip_from_the_server_is_asked_for_once_and_named(server, out, capsys):
    server.faults["patient0001"] = zip_of({"patient0001/../../../../evil": b"x"} | server.files_of("patient0001"))
    with pytest.raises(UserError, match=r"\(patient0001\)"):
        fetch(server, out, patients="1-2")
    assert "which is no plain file inside" in capsys.readouterr().out and server.count("patient0001") == 1
    assert camus.find_patients(out) == ["patient0002"] and "evil" not in os.listdir(os.path.dirname(out))


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(girder_client, "MAX_UNPACKED_BYTES", 10_000_000)
    path = write_zip(str(tmp_path / "bomb.zip"), ("p/zeros", bytes(20_000_000)))
    assert os.path.getsize(path) < 50_000
    with pytest.raises(FailedDownload, match="claims 1 files of 20000000 bytes"):
        girder_client.unpack(path, str(tmp_path / "target"), "p")
    # One that lies about its size: no more is written than it claims.
    with open(path, "r+b") as stream:
        lying = stream.read().replace((20_000_000).to_bytes(4, "little"), (1000).to_bytes(4, "little"))
        stream.seek(0)
        stream.write(lying)
    with pytest.raises(FailedDownload, match="damaged"):
        girder_client.unpack(path, str(tmp_path / "target"), "p")
    assert sum(os.path.getsize(name) for name in listing(tmp_path / "target")) <= 1000


def test_a_body_without_end_is_given_up(server, out, monkeypatch, capsys):
    monkeypatch.setattr(girder_client.Server.fetch, "__defaults__", (None, 1000))
    with pytest.raises(UserError, match="did not arrive"):
        fetch(server, out, patients="1")
    assert "failed  patient0001: sends more than 1000 bytes" in capsys.readouterr().out


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_a_zip_with_any_bytes_changed_never_crashes_and_never_writes_outside(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zip")
    files = [("p/a.txt", b"ED: 1\n" * 20), ("p/b.bin", bytes(range(256)))]
    write_zip(str(folder / "a.zip"), *files)
    packed = bytearray((folder / "a.zip").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    (folder / "b.zip").write_bytes(packed[: data.draw(st.integers(0, len(packed)))] if data.draw(st.booleans()) else packed)
    with contextlib.suppress(FailedDownload):
        girder_client.unpack(str(folder / "b.zip"), str(folder / "deep" / "target"), "p")
    found = listing(folder) - {str(folder / "a.zip"), str(folder / "b.zip")}
    assert all(name.startswith(str(folder / "deep" / "target")) for name in found)


def test_help_tells_every_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        download.job(["--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0 and all(f"--{name.replace('_', '-')}" in said for name in download.Options.__annotations__)
