"""The live page over HTTP: who may see and do what, and what comes back."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from live_page import PageRun, Visitor, served

from cache_store.errors import UserError
from orchestrator.cli import main
from orchestrator.ui.guard import read_token
from orchestrator.ui.server import Listening, open_server

ROOT = Path(__file__).parents[4]
HOSTILE = "<script>alert(1)</script>"


class Attributes(HTMLParser):
    """Every attribute of a page, as a browser reads it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [(name, value or "") for name, value in attrs]


@pytest.fixture
def run(tmp_path: Path) -> PageRun:
    (tmp_path / "outside.yaml").write_text("secret: 1\n")
    return PageRun(tmp_path / "runs" / "first", called=HOSTILE, renamed={"e2e": '"><img src=x onerror=alert(1)>'})


@pytest.fixture
def visitor(run: PageRun) -> Iterator[Visitor]:
    with served(run.run_dir.parent) as found:
        yield found


def test_pages_are_whole_without_scripts_and_load_nothing_from_elsewhere(run: PageRun, visitor: Visitor) -> None:
    run.commit_all()
    run.point("segprop", "stage1-base", 1, train_loss=2.0)
    for path in ("/", "/run?run=first", "/compare", "/plan", "/stop?run=first"):
        reply = visitor.get(path)
        assert reply.status == 200, path
        policy = reply.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        found = Attributes(reply.text).found
        links = [value for name, value in found if name in ("src", "href", "action")]
        assert [value for value in links if not value.startswith(("/", "#"))] == []
        assert [name for name, _ in found if name == "style" or name.startswith("on")] == [], "the policy allows none"
    page = visitor.get("/run?run=first").text
    assert "stage1-base" in page
    assert "<polyline" in page
    for path in ("/static/ui.css", "/static/ui.js", "/static/icon.svg"):
        reply = visitor.get(path)
        assert reply.status == 200
        assert "url(" not in reply.text
        assert "import" not in reply.text


def test_hostile_names_are_escaped(run: PageRun, visitor: Visitor) -> None:
    run.log(level="error", stage=HOSTILE, error=HOSTILE, event="failed")
    run.point(HOSTILE, HOSTILE, 1, train_loss=1.0)
    for path in ("/", "/run?run=first", "/stop?run=first", f"/run?run={HOSTILE}", f"/run?run=first&filter={HOSTILE}"):
        text = visitor.get(path).text
        assert "<script>alert" not in text
        assert "<img" not in text
    assert "&lt;script&gt;alert(1)" in visitor.get("/run?run=first").text


@pytest.mark.parametrize(
    "path",
    [
        *("/run?run=..", "/run?run=/etc", "/run?run=first/../..", "/run?run=first%00", "/run?run=link", "/run?run="),
        *("/files/../outside.yaml", "/files/first/%2e%2e/%2e%2e/outside.yaml", "/files/first/store/store.json"),
        *(
            "/files//etc/passwd",
            "/files/first/..%2f..%2foutside.yaml",
            "/files/link/config.yaml",
            "/files/leads/config.yaml",
        ),
        *(
            "/compare?run=first&run=..",
            "/compare?run=first&run=leads",
            "/run?run=leads",
            "/nothing",
            "/static/../server.py",
            "/api/run?run=..",
        ),
    ],
)
def test_nothing_outside_the_folder_is_shown(run: PageRun, visitor: Visitor, path: str) -> None:
    outside = run.run_dir.parents[1] / "elsewhere"
    outside.mkdir()
    (outside / "config.yaml").write_text("secret: 1\n")
    (run.run_dir.parent / "link").symlink_to(outside)
    leads = run.run_dir.parent / "leads"
    leads.mkdir()
    (leads / "config.yaml").symlink_to(outside / "config.yaml")
    reply = visitor.get(path)
    assert reply.status == 404
    assert "secret" not in reply.text


def test_another_host_is_refused(visitor: Visitor) -> None:
    assert visitor.get("/", Host=f"localhost:{visitor.port}").status == 200
    assert visitor.get("/", Host="[::1]:9").status == 200
    for host in (
        "evil.example",
        f"evil.example:{visitor.port}",
        "127.0.0.1.evil.example",
        "localhost@evil.example",
        "",
    ):
        assert visitor.get("/", Host=host).status == 421, host


def test_elsewhere_a_token_is_needed(run: PageRun) -> None:
    with served(run.run_dir.parent, host="0.0.0.0") as visitor:
        token = visitor.server.site.guard.token
        assert token is not None
        assert len(token) >= 32
        turned = visitor.get("/run?run=first")
        assert (turned.status, turned.headers["Location"]) == (303, "/login?after=/run%3Frun%3Dfirst")
        for path in ("/api/runs", "/events?page=/", "/files/first/config.yaml"):
            assert visitor.get(path).status == 401
            assert visitor.get(path, Authorization="Bearer wrong").status == 401
        assert visitor.get("/api/runs", Authorization=f"Bearer {token}").status == 200
        assert visitor.post("/plan", {"word": visitor.word, "config": "x.yaml"}).status == 303
        assert visitor.post("/login", {"word": visitor.word, "token": "wrong"}).status == 403
        shown = visitor.post("/login", {"word": visitor.word, "token": token, "after": "//evil.example"})
        assert (shown.status, shown.headers["Location"]) == (303, "/")
        cookie = shown.headers["Set-Cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Lax" in cookie
        assert token not in cookie
        assert visitor.get("/run?run=first", Cookie=cookie.partition(";")[0]).status == 200
        assert visitor.get("/", Cookie=cookie.partition("=")[0] + "=wrong").status == 303


def test_a_token_file_that_others_may_read_or_that_is_short_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("a-token-of-some-length\n")
    file.chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        read_token(file)
    file.chmod(0o600)
    assert read_token(file) == "a-token-of-some-length"
    file.write_text("short")
    with pytest.raises(UserError, match="fewer than 16"):
        read_token(file)


def test_what_acts_is_refused_from_other_pages(run: PageRun, visitor: Visitor) -> None:
    form = {"config": "x.yaml", "word": visitor.word}
    assert visitor.post("/plan", {"config": "x.yaml"}).status == 403
    assert visitor.post("/plan", {**form, "word": "0" * 64}).status == 403
    assert visitor.post("/plan", form, Origin="http://evil.example").status == 403
    assert visitor.post("/plan", form, Origin="null").status == 403
    assert visitor.post("/plan", form, Sec_Fetch_Site="cross-site").status == 403
    assert visitor.post("/plan", form, Content_Type="text/plain").status == 403
    own = visitor.post("/plan", form, Origin=f"http://127.0.0.1:{visitor.port}", Sec_Fetch_Site="same-origin")
    assert own.status == 404, "from our own page, and there is no such file"
    assert visitor.post("/run?run=first", {"word": visitor.word}).status == 404


def test_a_change_is_told_to_who_listens(run: PageRun, visitor: Visitor) -> None:
    page = "/run?run=first"
    mark = re.search(r'data-mark="(\w+)"', visitor.get(page).text)
    assert mark is not None
    with visitor.events(page, mark.group(1)) as events:
        run.commit("data", "model")
        told = next(events)
    assert told != mark.group(1)
    assert f'data-mark="{told}"' in visitor.get(page).text
    assert visitor.get("/events?page=/plan").status == 404


def test_listeners_are_bounded(visitor: Visitor) -> None:
    while visitor.server.site.listeners.acquire(blocking=False):
        pass
    reply = visitor.get("/events?page=/")
    assert reply.status == 503
    assert reply.headers["Retry-After"]


def test_results_are_sent_and_a_report_has_an_origin_of_its_own(run: PageRun, visitor: Visitor) -> None:
    (run.run_dir / "report.html").write_text("<h1>report</h1>")
    reply = visitor.get("/files/first/report.html")
    assert (reply.status, reply.text) == (200, "<h1>report</h1>")
    assert "sandbox" in reply.headers["Content-Security-Policy"]
    assert visitor.get("/files/first/config.yaml").headers["Content-Type"].startswith("text/plain")
    assert visitor.get("/files/first/summary.json").status == 404


def test_the_same_as_json(run: PageRun, visitor: Visitor) -> None:
    run.commit("data")
    (listed,) = json.loads(visitor.get("/api/runs").text)
    assert (listed["path"], listed["done"]) == ("first", 1)
    found = json.loads(visitor.get("/api/run?run=first").text)
    assert found["preparation"][0]["state"] == "stored"


def test_runs_side_by_side_mark_what_differs(run: PageRun) -> None:
    second = PageRun(run.run_dir.parent / "second")
    for each, lr in ((run, 0.1), (second, 0.2)):
        with (each.run_dir / "config.yaml").open("a") as file:
            file.write(f"lr: {lr}\n")
    with served(run.run_dir.parent) as visitor:
        text = visitor.get("/compare?run=first&run=second&all=1").text
        rows = dict(re.findall(r"<tr( class=\"differs\")?>.*?<code>([\w.]+)</code>", text))
        assert {key: mark for mark, key in rows.items()}.keys() >= {"lr"}
        assert re.search(r'class="differs"><th[^>]*><span class="unequal"[^>]*>≠.*?<code>lr</code>', text)
        assert not re.search(r'class="differs"><th[^>]*><span[^>]*>≠[^/]*/span></span><code>seed</code>', text)
        assert "Choose two runs or more." in visitor.get("/compare?run=first").text


def test_a_plan_is_what_segprop_plan_says_and_one_is_made_at_a_time(run: PageRun, tmp_path: Path) -> None:
    folder = run.run_dir.parent
    (folder / "-wrong.yaml").write_text("training: {epochs: 3}\n<b>: 1\n")
    with served(folder) as visitor:
        assert visitor.get("/plan?config=-wrong.yaml").text.count("<option selected>-wrong.yaml</option>") == 1
        form = {"word": visitor.word, "config": "-wrong.yaml"}
        planner = visitor.server.site.planner
        with planner._busy:
            assert visitor.post("/plan", form).status == 503
        said = visitor.post("/plan", form)
        assert said.status == 200
        assert "-wrong.yaml: no plan" in said.text
        assert "&lt;b&gt;" in said.text
        assert "<b>" not in said.text
        assert visitor.post("/plan", {**form, "config": "../outside.yaml"}).status == 404
        assert visitor.get("/plan?word=x&config=-wrong.yaml").text.count("no plan") == 0, "GET runs nothing"


def test_the_driver_is_asked_once_and_only_after_it_is_known(run: PageRun, visitor: Visitor) -> None:
    """The driver is a process of its own that holds the lease and the log, and says what signals came."""
    script = (
        "import signal, sys, time; from pathlib import Path; sys.path[:0] = [sys.argv[2]]\n"
        "from orchestrator.execution.run_lease import *; from cache_store.storage.open import open_storage\n"
        "from live_page import DIGEST\n"
        "run_dir = Path(sys.argv[1]); log = open(run_dir / 'log.jsonl', 'a')\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('asked', flush=True))\n"
        "lease = RunLease.acquire(open_storage(str(run_dir / 'store')), Claim(DIGEST, 'fake', str(run_dir)))\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
    )
    support = str(Path(__file__).parents[3] / "support")
    driver = subprocess.Popen(
        [sys.executable, "-c", script, str(run.run_dir), support],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert driver.stdin is not None
    assert driver.stdout is not None
    try:
        assert driver.stdout.readline() == "ready\n"
        question = visitor.get("/stop?run=first").text
        assert f"driver {driver.pid} on " in question
        assert visitor.get("/stop?run=first&driver=1").status == 200, "GET only asks"
        form = {"run": "first", "driver": "1", "word": visitor.word}
        assert visitor.post("/stop", {**form, "driver": "7"}).status == 404
        assert "was asked to stop" in visitor.post("/stop", form).text
        assert driver.stdout.readline() == "asked\n"
        assert "asked already" in visitor.post("/stop", form).text
    finally:
        driver.kill()
        driver.wait()
        driver.stdin.close()
        driver.stdout.close()
    assert visitor.post("/stop", form).status == 404, "it is dead"


def test_a_process_that_only_the_store_calls_a_driver_is_left_alone(run: PageRun, visitor: Visitor) -> None:
    """Whoever may write to the store could name any process: here this one, which does not have the log open."""
    run.log(message="x")
    lease = run.lease()
    reply = visitor.post("/stop", {"run": "first", "driver": "1", "word": visitor.word})
    assert reply.status == 404
    assert "left alone" in reply.text
    assert f"kill {os.getpid()}" in reply.text
    lease.release("stopped")


def test_bad_places_and_taken_ports_are_said(
    tmp_path: Path, run: PageRun, visitor: Visitor, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for place, words in ((empty, "neither a run nor a configuration"), (tmp_path / "nowhere", "no such folder")):
        assert main(["ui", str(place)]) == 2
        assert words in capsys.readouterr().err
    assert main(["ui", str(run.run_dir), "--port", str(visitor.port)]) == 2
    assert "--port N names another" in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot be used"):
        open_server(run.run_dir, Listening("no-such-host.invalid", 0))


def test_ctrl_c_ends_it_with_0(run: PageRun) -> None:
    command = [sys.executable, "-m", "orchestrator.cli", "ui", str(run.run_dir), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        said = process.stdout.readline()
        assert re.match(r"segprop ui: http://127\.0\.0\.1:\d+/ shows ", said)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
        assert process.stderr.read() == ""


def test_nonsense_is_answered_and_the_server_goes_on(visitor: Visitor) -> None:
    for line in (b"GARBAGE\r\n\r\n", b"POST /plan HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999\r\n\r\n"):
        connection = http.client.HTTPConnection("127.0.0.1", visitor.port, timeout=20)
        connection.connect()
        connection.sock.sendall(line)
        assert connection.sock.recv(100)
        connection.close()
    assert visitor.get("/%ff").status == 400
    assert visitor.get("/run?" + "a=1&" * 100).status == 400
    assert visitor.get("/").status == 200
