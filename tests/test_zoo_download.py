"""Downloads from servers that cut, lie, stall and break: never an unverified byte under the final name."""

import gzip
import hashlib
import http.server
import os
import random
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import solo_ext
from solo_ext.errors import CheckpointError
from solo_ext.zoo import download as module
from solo_ext.zoo.download import download

CONTENT = random.Random(0).randbytes(300_000)
OTHER = random.Random(1).randbytes(300_000)
SIZE, SHA256 = len(CONTENT), hashlib.sha256(CONTENT).hexdigest()
CUT = 1 << 16
HTML = b"<!doctype html><title>Please log in</title>"
CLIENTS = """if True:
    import importlib.util, os, pathlib, sys
    file, source, target, size, sha256, processes = sys.argv[1:]
    spec = importlib.util.spec_from_file_location("download", file)  # without its package, which imports torch
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    go, start = os.pipe()
    children = []
    for _ in range(int(processes)):
        if not (child := os.fork()):
            os.close(start)
            os.read(go, 1)  # until all are there
            module.download(source, pathlib.Path(target), int(size), sha256)
            sys.exit()
        children.append(child)
        print(child, flush=True)
    os.close(start)
    sys.exit(sum(os.waitpid(child, 0)[1] != 0 for child in children))
"""


class Server(http.server.ThreadingHTTPServer):
    """Answers its n-th request by `answer(handler, n)` and remembers the headers of all."""

    daemon_threads = True

    def __init__(self, certificate: Path | None = None):
        super().__init__(("127.0.0.1", 0), Handler)
        self.scheme, self.requests, self.answer, self.lock = "http", [], serve, threading.Lock()
        self.stalled = threading.Event()
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self.socket, self.scheme = context.wrap_socket(self.socket, server_side=True), "https"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_port}/zoo/model.safetensors"

    @property
    def starts(self) -> list[int]:
        """The offset that each request asked for."""
        return [first_byte(headers) for headers in self.requests]

    def handle_error(self, request, client_address):
        pass  # a client that was killed


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        with self.server.lock:
            n = len(self.server.requests)
            self.server.requests.append(self.headers)
        self.close_connection = True
        self.server.answer(self, n)

    def log_message(self, *_):
        pass


def first_byte(headers) -> int:
    return int(re.fullmatch(r"bytes=(\d+)-", headers.get("Range", "bytes=0-"))[1])


def respond(handler, status: int, body: bytes, **headers) -> None:
    handler.send_response(status)
    headers = {
        "Content_Length": len(body),
        "Content_Type": "application/octet-stream",
        "Connection": "close",
        **headers,
    }
    for name, value in headers.items():
        if value is not None:
            handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()
    handler.wfile.write(body)


def serve(handler, n, data=CONTENT, cut=None, ranges=True, shift=0, **headers) -> None:
    """A good server, which may close the connection after `cut` bytes, ignore ranges or be wrong by `shift` bytes."""
    start = first_byte(handler.headers) if ranges else 0
    body, headers = data[start:], {"Content_Length": len(data) - start, **headers}
    if start:
        where = f"bytes {start + shift}-{len(data) - 1}/{len(data)}"
        respond(handler, 206, body[shift:][:cut], **{**headers, "Content_Range": where})
    else:
        respond(handler, 200, body[:cut], **headers)


def answers(*each, then=serve):
    """The first answers, and the one to all later requests."""
    return lambda handler, n: (each[n] if n < len(each) else then)(handler, n)


def server_with(**kwargs):
    return lambda handler, n: serve(handler, n, **kwargs)


def says(status: int, body: bytes = b"{}", **headers):
    return lambda handler, n: respond(handler, status, body, **headers)


def but_ranges(answer):
    """Any answer to a Range; otherwise a good server whose first connection is cut."""
    return lambda handler, n: (answer if first_byte(handler.headers) else server_with(cut=None if n else CUT))(
        handler, n
    )


def hangs_up(handler, n) -> None:
    handler.connection.close()


def redirect(handler, n, to: str | None = None) -> None:
    respond(handler, 302, b"", Location=to or handler.path)


def slowly(handler, n) -> None:
    respond(handler, 200, b"", Content_Length=SIZE)
    for start in range(0, SIZE, SIZE // 20):
        handler.wfile.write(CONTENT[start : start + SIZE // 20])
        time.sleep(0.01)


def stalls(handler, n) -> None:
    respond(handler, 200, CONTENT[: SIZE // 2], Content_Length=SIZE)
    handler.server.stalled.wait(30)


def endless(handler, n) -> None:
    respond(handler, 200, b"", Content_Length=None)
    while True:
        handler.wfile.write(bytes(CUT))


def chunked(handler, n, data=CONTENT, **headers) -> None:
    respond(handler, 200, b"", Content_Length=None, Transfer_Encoding="chunked", **headers)
    for start in range(0, len(data), 1000):
        block = data[start : start + 1000]
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(block), block))
    handler.wfile.write(b"0\r\n\r\n")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    if not shutil.which("openssl"):
        pytest.skip("openssl makes the certificate of the test's server")
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    command = "openssl req -x509 -nodes -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -days 2 -subj /CN=127.0.0.1"
    out = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(path), "-out", f"{path}.crt"]
    subprocess.run([*command.split(), *out], check=True, capture_output=True)
    with open(path, "ab") as file:
        file.write(Path(f"{path}.crt").read_bytes())
    return path


@pytest.fixture
def server():
    with Server() as server:
        yield server
        server.stalled.set()
        server.shutdown()


@pytest.fixture
def secure_server(certificate, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
    with Server(certificate) as server:
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "WAITS", (0, 0, 0, 0))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def target(tmp_path, monkeypatch):
    """A path that is watched: whenever something lies there, it is the right file."""
    path = tmp_path / "cache" / "model.safetensors"
    unverified, done = [], threading.Event()

    def watch():
        while not done.wait(0.001):
            if path.exists() and path.read_bytes() != CONTENT:
                unverified.append(path.stat().st_size)

    def replace(source, destination, real=os.replace):
        assert Path(source).read_bytes() == CONTENT and Path(destination) == path
        real(source, destination)

    monkeypatch.setattr(os, "replace", replace)
    watcher = threading.Thread(target=watch)
    watcher.start()
    yield path
    done.set()
    watcher.join()
    assert not unverified


def fetch(source, target: Path, **kwargs) -> None:
    download(str(source), target, SIZE, SHA256, **kwargs)


def part_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.{SHA256[:16]}.part")


def refused(source, target: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        fetch(source, target)
    assert str(caught.value).isprintable()
    assert not target.exists()


GOOD = {  # the server, and how many requests the file takes
    "at once": (serve, 1),
    "cuts every 64 KiB": (server_with(cut=CUT), 5),
    "cuts, then ignores Range": (answers(server_with(cut=CUT), then=server_with(ranges=False)), 2),
    "cuts, then a wrong Content-Range": (answers(server_with(cut=CUT), server_with(shift=9)), 3),
    "cuts, then no Content-Range": (answers(server_with(cut=CUT), says(206, OTHER[CUT:])), 3),
    "cuts, then 416": (answers(server_with(cut=CUT), says(416, b"", Content_Range=f"bytes */{CUT}")), 3),
    "416 to all ranges": (but_ranges(says(416)), 3),
    "ranges of something compressed": (
        but_ranges(
            says(206, b"?", Content_Range=f"bytes {CUT}-{SIZE - 1}/{SIZE}", Content_Encoding="gzip", Content_Length=1)
        ),
        3,
    ),
    "416, then cuts every 16 KiB": (answers(server_with(cut=2 * CUT), says(416), then=server_with(cut=CUT // 4)), None),
    "changes after a cut": (answers(server_with(data=OTHER, cut=CUT, ETag='"1"'), then=server_with(ETag='"2"')), 3),
    "500 twice": (answers(says(500), says(503)), 3),
    "429": (answers(says(429, Retry_After=1)), 2),
    "hangs up": (answers(hangs_up, hangs_up, server_with(cut=0)), 4),
    "faults between cuts": (answers(*[says(502), hangs_up, server_with(cut=CUT)] * 4), 13),
    "slow": (slowly, 1),
    "stalls": (answers(stalls), 2),
    "no length": (server_with(Content_Length=None), 1),
    "no length, cut": (answers(server_with(Content_Length=None, cut=CUT)), 2),
    "chunked": (chunked, 1),
    "gzip": (lambda handler, n: respond(handler, 200, gzip.compress(CONTENT), Content_Encoding="gzip"), 1),
    "sends more than it says": (server_with(data=CONTENT + OTHER, Content_Length=SIZE), 1),
    "redirects": (answers(redirect, redirect), 3),
}


@pytest.mark.parametrize("name", GOOD)
def test_servers_that_can_be_used(server, target, name, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUTS", (5, 0.3))
    server.answer, requests = GOOD[name]
    arrived = []
    fetch(server.url, target, progress=arrived.append)
    assert target.read_bytes() == CONTENT and not part_of(target).exists()
    assert arrived[-1] == SIZE == max(arrived)
    assert requests in (len(server.requests), None)
    for headers in server.requests:
        assert headers["User-Agent"] == f"solo-ext/{solo_ext.__version__}"
        assert headers["Accept-Encoding"] == "identity"


PAGE = {"Content_Type": "text/html; charset=utf-8"}
NO_PROGRESS = r"5 attempts brought nothing new \(%s\); the next download goes on after %s of 300,000 bytes$"
BAD = {  # the server, what is said, and how many requests it takes to know
    "a web page": (says(200, HTML, **PAGE), r"sends a web page \(text/html, 43 bytes\), not the 300,000 bytes", 1),
    "a web page in chunks": (lambda *a: chunked(*a, HTML, **PAGE), r"sends a web page \(text/html\), not the", 1),
    "a web page of that size": (
        says(200, HTML.ljust(SIZE), **PAGE),
        rf"not the file expected but seems to be a web page: SHA-256 [0-9a-f]{{12}}, not {SHA256[:12]}$",
        1,
    ),
    "a web page when resumed": (answers(server_with(cut=CUT), then=says(200, HTML, **PAGE)), "sends a web page", 2),
    "an API's answer": (
        says(200, b'{"error": 1}', Content_Type="application/json"),
        r"sends another file \(application/json, 12 bytes\)",
        1,
    ),
    "JSON of that size": (says(200, b"{}".ljust(SIZE)), "not the file expected but seems to be JSON: SHA", 1),
    "another file": (
        server_with(data=OTHER),
        rf"/model.safetensors is not the file expected: SHA-256 {hashlib.sha256(OTHER).hexdigest()[:12]}, "
        rf"not {SHA256[:12]}$",
        1,
    ),
    "another file in pieces": (server_with(data=OTHER, cut=2 * CUT), "not the file expected: SHA", 6),
    "one flipped bit": (server_with(data=CONTENT[:-1] + bytes([CONTENT[-1] ^ 1])), "not the file expected: SHA", 1),
    "changes after each cut": (
        lambda handler, n: serve(handler, n, data=(CONTENT, OTHER)[n % 2], cut=2 * CUT),
        "not the file expected: SHA",
        6,
    ),
    "another length": (server_with(data=CONTENT[:-1]), r"sends another file \(application/octet-stream, 299,999 b", 1),
    "too long": (server_with(data=CONTENT + b"!"), r"\(application/octet-stream, 300,001 bytes\), not the 300,000", 1),
    "another length when resumed": (
        answers(server_with(cut=CUT), then=server_with(data=CONTENT + b"!")),
        "300,001 bytes",
        2,
    ),
    "a length beyond all numbers": (server_with(Content_Length="9" * 5000, data=OTHER), "not the file expected", 1),
    "endless": (endless, "not the file expected: SHA", 1),
    **{f"{code}": (says(code), f"cannot be fetched: {code} [A-Z][A-Za-z ]+$", 1) for code in (401, 403, 404, 410, 304)},
    "500": (says(500), NO_PROGRESS % ("500 Internal Server Error", 0), 5),
    "599": (says(599), NO_PROGRESS % ("599", 0), 5),
    "429": (says(429, Retry_After=1), NO_PROGRESS % ("429 Too Many Requests", 0), 5),
    "hangs up": (hangs_up, NO_PROGRESS % (".*", 0), 5),
    "ends at once": (server_with(cut=0), NO_PROGRESS % (r"IncompleteRead\(0 bytes read, 300000 more .*\)", 0), 5),
    "falls silent": (
        answers(server_with(cut=CUT), then=says(504)),
        NO_PROGRESS % ("504 Gateway Timeout", "65,536"),
        6,
    ),
    "cuts, ignores Range": (server_with(cut=CUT, ranges=False), NO_PROGRESS % (".*", "65,536"), 6),
    "ever shorter, ignores Range": (
        lambda handler, n: serve(handler, n, cut=CUT * (3 - n % 2), ranges=False),
        NO_PROGRESS % (".*", r"\d+,\d+"),
        None,
    ),
    "cuts, a wrong Content-Range": (server_with(cut=CUT, shift=1), NO_PROGRESS % (".*", ".*"), None),
    "redirects in a circle": (redirect, "cannot be fetched: Exceeded 30 redirects$", 31),
    "redirects to a disk": (lambda *a: redirect(*a, "file:///etc/passwd"), "redirected to an address without https", 1),
    "redirects to nowhere": (lambda *a: redirect(*a, "http://[/"), "cannot be fetched: ", 1),
    "no chunks": (
        lambda handler, n: respond(handler, 200, OTHER, Content_Length=None, Transfer_Encoding="chunked"),
        NO_PROGRESS % ("InvalidChunkLength", 0),
        5,
    ),
    "no HTTP": (lambda handler, n: handler.wfile.write(OTHER), NO_PROGRESS % ("BadStatusLine", 0), 5),
}


@pytest.mark.parametrize("name", BAD)
def test_servers_that_cannot(server, target, name):
    server.answer, message, requests = BAD[name]
    refused(server.url, target, message)
    assert requests in (len(server.requests), None)
    kept = part_of(target).read_bytes() if part_of(target).exists() else b""
    assert len(kept) <= SIZE and (kept or not part_of(target).exists())
    if "not the file expected" in message:
        assert not kept
    server.answer = serve  # whatever is left does not hinder the next download
    fetch(server.url, target)
    assert target.read_bytes() == CONTENT and not part_of(target).exists()
    server.answer = BAD[name][0]
    served = len(server.requests)
    fetch(server.url, target)
    assert len(server.requests) == served


def test_https_stays_https(server, secure_server, target):
    secure_server.answer = lambda *a: redirect(*a, server.url)
    refused(secure_server.url, target, "is redirected to an address without https, which is refused$")
    assert not server.requests and len(secure_server.requests) == 1
    server.answer = lambda *a: redirect(*a, secure_server.url)
    secure_server.answer = server_with(cut=2 * CUT)
    fetch(server.url, target)
    assert secure_server.starts[1:] == [0, 2 * CUT, 4 * CUT]
    assert target.read_bytes() == CONTENT


def test_a_certificate_that_nobody_knows(secure_server, target, monkeypatch):
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    refused(secure_server.url, target, "cannot be fetched: .*certificate verify failed")
    assert not secure_server.requests
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere.pem")
    refused(secure_server.url, target, "cannot be fetched: .*/nowhere.pem$")


def test_no_server(target):
    with Server() as server:
        url = server.url.replace("http://", "http://me:secret@")
        server.shutdown()
    with pytest.raises(CheckpointError, match=NO_PROGRESS % ("Connection refused", 0)) as caught:
        fetch(url, target)
    assert "secret" not in str(caught.value)


def test_waits_grow(server, target, monkeypatch):
    slept = []
    monkeypatch.setattr(module, "WAITS", (0.5, 1.0, 3.0, 8.0))
    monkeypatch.setattr(time, "sleep", lambda seconds: slept.append(seconds) if seconds >= 0.5 else None)
    server.answer = answers(says(500), says(500), server_with(cut=CUT), then=says(500))
    refused(server.url, target, "5 attempts brought nothing new")
    assert slept == [0.5, 1.0, 0.5, 1.0, 3.0, 8.0]


@pytest.mark.parametrize("form", ["path", "url", "localhost", "relative"])
def test_from_the_disk(tmp_path, target, form, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a mirror" / "100% ü?#.bin"
    source = {
        "path": path,
        "url": path.as_uri(),
        "localhost": path.as_uri().replace("file://", "FILE://localhost"),
        "relative": path.relative_to(tmp_path),
    }[form]
    refused(source, target, rf"^there is no file {re.escape(str(source if form == 'relative' else path))}$")
    path.mkdir(parents=True)
    refused(source, target, "^there is no file ")
    path.rmdir()
    path.write_bytes(CONTENT[1:])
    refused(source, target, "has 299,999 bytes, not the 300,000 expected$")
    path.write_bytes(OTHER)
    refused(source, target, "is not the file expected: SHA-256 ")
    path.write_bytes(HTML.ljust(SIZE))
    refused(source, target, "but seems to be a web page: SHA-256 ")
    path.write_bytes(CONTENT)
    fetch(source, target)
    assert target.read_bytes() == CONTENT
    assert sorted(os.listdir(target.parent)) == [".model.safetensors.lock", "model.safetensors"]


@pytest.mark.parametrize("source", ["ftp://host/x", "hf://owner/name", "s3://bucket/x", "://"])
def test_other_schemes(target, source):
    refused(source, target, f"^{source} is no https://, http:// or file:// URL, and no path$")


PARTS = {  # what lies there from before -> what is asked for
    "some": (CONTENT[:1000], [1000]),
    "nothing": (b"", [0]),
    "all but one byte": (CONTENT[:-1], [SIZE - 1]),
    "all": (CONTENT, []),
    "too much": (CONTENT + b"!", [0]),
    "another file": (OTHER, [0]),
    "some of another file": (OTHER[:1000], [1000, 0]),
}


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("local", [False, True])
def test_parts_of_earlier_downloads(server, target, tmp_path, name, local):
    left, starts = PARTS[name]
    target.parent.mkdir()
    part_of(target).write_bytes(left)
    (tmp_path / "x").write_bytes(CONTENT)
    fetch(tmp_path / "x" if local else server.url, target)
    assert target.read_bytes() == CONTENT and not part_of(target).exists()
    assert server.starts == ([] if local else starts)


def test_a_verified_file_is_left_alone_and_a_damaged_one_replaced(server, tmp_path, caplog):
    target = tmp_path / "x"
    target.write_bytes(CONTENT)
    before = target.stat().st_mtime_ns
    fetch(server.url, target)
    assert target.stat().st_mtime_ns == before and not server.requests and os.listdir(tmp_path) == ["x"]
    for damaged in (b"", CONTENT[:-1], OTHER, HTML):
        caplog.clear()
        target.write_bytes(damaged)
        server.answer = says(404)
        refused(server.url, target, "404 Not Found$")
        assert caplog.messages == [f"{target} is damaged; it is fetched again"]
        target.write_bytes(damaged)
        server.answer = serve
        fetch(server.url, target)
        assert target.read_bytes() == CONTENT
    target.unlink()
    target.symlink_to("nowhere")
    fetch(server.url, target)
    assert target.read_bytes() == CONTENT and not target.is_symlink()


def clients(url: str, target: Path, processes: int) -> subprocess.Popen:
    """That many processes which download at once; it prints their ids and ends with the number that failed."""
    env = {**os.environ, "PYTHONPATH": str(Path(solo_ext.__file__).parents[1])}
    argv = [sys.executable, "-c", CLIENTS, module.__file__, url, str(target), str(SIZE), SHA256, str(processes)]
    return subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_eight_processes_at_once(server, target):
    server.answer = answers(server_with(cut=CUT), slowly)
    eight = clients(server.url, target, 8)
    _, errors = eight.communicate(timeout=120)
    assert eight.returncode == 0 and not errors
    assert server.starts == [0, CUT]  # of one process
    assert target.read_bytes() == CONTENT


def test_kill_9_while_another_process_waits(server, target):
    server.answer = answers(stalls)
    first = clients(server.url, target, 1)
    child = int(first.stdout.readline())
    until(lambda: part_of(target).exists() and part_of(target).stat().st_size > SIZE // 3)
    second = clients(server.url, target, 1)
    second.stdout.readline()
    time.sleep(0.2)
    assert len(server.requests) == 1  # the second waits
    os.kill(child, signal.SIGKILL)
    first.communicate(timeout=120)
    _, errors = second.communicate(timeout=120)
    assert (first.returncode, second.returncode) == (1, 0) and not errors
    (_, resumed) = server.starts
    assert SIZE // 3 < resumed <= SIZE // 2
    assert target.read_bytes() == CONTENT


def until(happened, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_ctrl_c_keeps_what_has_arrived(server, target):
    def interrupt(count):
        if count > 100_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(server.url, target, progress=interrupt)
    fetch(server.url, target)
    assert 100_000 < server.starts[1] < 100_000 + module.BLOCK + 1 and target.read_bytes() == CONTENT


@pytest.mark.parametrize("seed", range(20))
def test_random_cuts(server, tmp_path, seed):
    """Cut by the server and by the user, at any byte; each piece goes on from the one before."""
    rng = random.Random(seed)
    content = rng.randbytes(rng.choice([1, 1000, 50_000, 200_000]))
    digest, target = hashlib.sha256(content).hexdigest(), tmp_path / "x"
    server.answer = lambda handler, n: serve(handler, n, data=content, cut=rng.randrange(module.BLOCK, 80_000))
    while not target.exists():
        stop = rng.randrange(len(content) + 50_000)

        def progress(count, stop=stop):
            if count > stop:
                raise KeyboardInterrupt

        try:
            download(server.url, target, len(content), digest, progress)
        except KeyboardInterrupt:
            assert not target.exists()
    assert target.read_bytes() == content
    assert server.starts == sorted(server.starts)


def test_on_the_disk_before_the_name_and_the_name_too(server, target, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: [done.append(os.fstat(handle).st_ino), fsync(handle)])
    monkeypatch.setattr(os, "replace", lambda *paths: [done.append("replace"), replace(*paths)])
    fetch(server.url, target)
    assert done == [target.stat().st_ino, "replace", target.parent.stat().st_ino]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MB; skips where none can be mounted."""
    folder = tmp_path / "cache"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(server, small_disk, target):
    filler = small_disk / "filler"
    filler.write_bytes(bytes(800_000))
    refused(server.url, target, r"needs 300,000 bytes more, and its disk has 2\d\d,\d\d\d$")
    assert not server.requests
    filler.unlink()

    def fill(count):
        with open(filler, "ab") as file:
            file.write(bytes(50_000))

    with pytest.raises(CheckpointError, match=rf"^{target} cannot be written: No space left on device$"):
        fetch(server.url, target, progress=fill)
    assert sorted(os.listdir(small_disk)) == [".model.safetensors.lock", "filler"]
    filler.unlink()
    fetch(server.url, target)


def test_a_disk_that_is_read_only(server, small_disk, target):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    refused(server.url, target, rf"^{target} cannot be written: Read-only file system$")
    assert not server.requests


def test_files_that_may_not_grow(server, target):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for limit in (1, 10_000, 123_456, SIZE - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            refused(server.url, target, rf"^{target} cannot be written: File too large$")
            assert os.listdir(target.parent) == [".model.safetensors.lock"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_folder_that_cannot_be_made(server, tmp_path):
    (tmp_path / "file").touch()
    target = tmp_path / "file" / "x" / "y"
    refused(server.url, target, rf"^{target} cannot be written: Not a directory$")
    (tmp_path / "y").mkdir()
    refused_folder = tmp_path / "y"
    with pytest.raises(CheckpointError, match=rf"^{refused_folder} cannot be written: Is a directory$"):
        fetch(server.url, refused_folder)
