"""The studio's server: what it answers, and whom it refuses."""

import io
import time

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient
from studio_models import make_models, make_results, tiny

import lexel
from lexel import samples
from lexel.errors import UsageError
from lexel.generators import Generator, read_config
from lexel.studio import Library, codebook, make_app, pictures
from lexel.studio.guard import COOKIE
from lexel.studio.jobs import AT_ONCE, Job, Stopped

HERE = "http://127.0.0.1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def app(folder):
    return make_app(Library([folder]))


@pytest.fixture
def client(app):
    with TestClient(app, base_url=HERE) as found:
        yield found


def photo(width=40, height=30, kind="PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)).save(buffer, kind)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------- what it shows


def test_a_folder_of_runs_and_models_gives_all_of_them(client):
    shown = client.get("/api/studio").json()["models"]
    assert [(model["key"], model["kind"], model["run"]) for model in shown] == [
        ("a", "tokenizer", False),
        ("b", "tokenizer", False),
        ("run", "tokenizer", True),
        ("generator", "generator", False),
    ]


def test_a_source_that_holds_nothing_is_refused(tmp_path):
    with pytest.raises(UsageError):
        Library([tmp_path / "nothing"])


def test_an_uploaded_picture_comes_back_as_the_tokenizer_makes_it(client, folder):
    shown = client.post("/api/models/a/reconstruct", content=photo()).json()
    assert (shown["width"], shown["height"], shown["layout"]["shape"]) == (16, 16, [4, 4])
    decoded = client.post("/api/models/a/decode", json={"indices": shown["indices"], "shape": [4, 4]}).json()
    assert decoded["picture"] == shown["reconstruction"]


def test_a_whole_picture_keeps_its_size(client):
    shown = client.post("/api/models/a/reconstruct?whole=1", content=photo(41, 30)).json()
    assert (shown["width"], shown["height"], shown["layout"]["rows"], shown["layout"]["columns"]) == (41, 30, 8, 11)


def test_changing_one_token_changes_the_picture(client):
    shown = client.post("/api/models/a/reconstruct?example=0").json()
    indices = shown["indices"]
    indices[5] = (indices[5] + 1) % 16
    changed = client.post("/api/models/a/decode", json={"indices": indices, "shape": [4, 4]}).json()
    assert changed["picture"] != shown["reconstruction"]


def test_the_codebook_lists_every_code_once_most_used_first(client):
    shown = client.get("/api/models/a/codes").json()
    assert sorted(shown["codes"]) == list(range(16))
    assert shown["counts"] == sorted(shown["counts"], reverse=True)
    dead = client.get("/api/models/a/codes?order=dead").json()
    assert len(dead["codes"]) == 16 - shown["used"]


def test_the_nearest_codes_are_the_nearest(client, folder):
    shown = client.get("/api/models/a/codes/3").json()
    table = lexel.load(folder / "a").quantizer.codebook.detach()
    distances = (table - table[3]).norm(dim=1)
    assert [near["code"] for near in shown["nearest"]] == distances.argsort()[1:9].tolist()


def test_every_book_of_a_residual_codebook_can_be_looked_at(client):
    layout = client.get("/api/models/b").json()["layout"]
    assert layout["books"] == layout["shape"][0] > 1
    last = layout["books"] - 1
    assert len(client.get(f"/api/models/b/codes?book={last}").json()["codes"]) == 8
    assert client.get(f"/api/models/b/codes?book={last + 1}").status_code == 400


def test_the_map_has_a_point_for_every_code(client):
    shown = client.get("/api/models/a/map").json()
    assert len(shown["points"]) == len(shown["codes"]) == 16


def finished(client, job):
    deadline = time.monotonic() + 60
    while job["state"] == "running" and time.monotonic() < deadline:
        time.sleep(0.02)
        job = client.get(f"/api/jobs/{job['number']}").json()
    return job


def test_generating_keeps_the_given_tokens(client):
    given = [-1] * 8 + [3] * 8
    job = finished(client, client.post("/api/models/generator/generate", json={"class": "dog", "given": given}).json())
    assert job["state"] == "done", job["error"]
    assert len(job["result"]["images"]) == 4
    assert all(tokens[8:] == [3] * 8 for tokens in job["result"]["tokens"])


def test_the_same_seed_gives_the_same_pictures(client):
    options = {"class": "1", "seed": 7, "count": 2}
    one, other = (
        finished(client, client.post("/api/models/generator/generate", json=options).json())["result"] for _ in range(2)
    )
    assert one == other


@pytest.mark.parametrize(
    "options", [{"count": 17}, {"count": 1.5}, {"temperature": "hot"}, {"class": "yak"}, {"given": [1]}]
)
def test_a_wrong_option_of_generating_is_a_sentence(client, options):
    job = finished(client, client.post("/api/models/generator/generate", json=options).json())
    assert job["state"] == "failed"
    assert job["error"]
    assert "Traceback" not in job["error"]


def test_a_job_can_be_stopped(folder, monkeypatch):
    from lexel.studio import views

    def endless(entry, options, job):
        while True:
            time.sleep(0.01)
            job.progress(1, 2)

    monkeypatch.setattr(views, "generate", endless)
    with TestClient(make_app(Library([folder / "generator"])), base_url=HERE) as client:
        jobs = [client.post("/api/models/generator/generate", json={}).json() for _ in range(AT_ONCE)]
        assert client.post("/api/models/generator/generate", json={}).status_code == 400  # no more at once
        for job in jobs:
            client.delete(f"/api/jobs/{job['number']}")
        assert {finished(client, job)["state"] for job in jobs} == {"stopped"}


def test_a_run_shows_curves_and_verdicts(client):
    shown = client.get("/api/models/run/training").json()
    assert shown["curves"]["loss"]["training"] == [[10, 0.1], [20, 0.05]]
    assert shown["findings"][0]["level"] == "problem"  # collapsed
    assert client.get("/api/models/a/training").json()["error"].startswith("a is no run")


@pytest.mark.parametrize("path, method", [
    ("a", "get"), ("a/codes", "get"), ("a/map", "get"), ("a/reconstruct?example=0", "post"),
])  # fmt: skip
def test_long_work_is_a_job_when_asked_and_gives_the_same(client, path, method):
    ask = getattr(client, method)
    at_once = ask(f"/api/models/{path}").json()
    job = finished(client, ask(f"/api/models/{path}{'&' if '?' in path else '?'}job=1").json())
    assert job["state"] == "done", job["error"]
    for found in (at_once, job["result"]):
        found.pop("seconds", None)
    assert job["result"] == at_once


def test_decoding_codes_stops_between_batches(folder):
    entry = Library([folder]).find("a")
    job = Job()
    job.stop.set()
    with pytest.raises(Stopped):
        codebook.page(entry, job=job)


def test_results_that_can_be_compared_stand_together(folder, tmp_path):
    files = make_results(tmp_path)
    with TestClient(make_app(Library([folder, *files])), base_url=HERE) as client:
        shown = client.get("/api/results").json()
        assert client.get("/api/studio").json()["start"] == "reconstruct"
    assert [[row["name"] for row in board["rows"]] for board in shown["boards"]] == [["small", "large"], ["elsewhere"]]
    assert "data differs" in shown["boards"][1]["apart"]
    assert shown["boards"][0]["rows"][0]["values"]["psnr"]["low"] == pytest.approx(17.3)
    assert shown["comparisons"][0]["rows"] == [["ibq", "16", "4", "64", "18.00 ± 0.25"]]
    assert shown["comparisons"][0]["name"] == "compared"


def test_results_alone_open_as_results_and_what_holds_none_is_refused(tmp_path):
    library = Library(make_results(tmp_path)[:1])
    assert library.only_results
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UsageError, match="no result of `lexel evaluate`"):
        Library([tmp_path / "other.json"])
    (tmp_path / "compared" / "compare.json").write_text("{}")
    with pytest.raises(UsageError, match="no comparison of `lexel compare`"):
        Library([tmp_path / "compared"])


def test_models_run_where_the_studio_was_told(folder):
    for kind in ("a", "generator"):
        entry = Library([folder], device="cpu").find(kind)
        entry.device = torch.device("meta")  # any that is not the usual one
        assert {parameter.device.type for parameter in entry.tokenizer.parameters()} == {"meta"}
        assert next(entry.model.parameters()).device.type == "meta"


class Encoder:
    """Stands for a text encoder."""

    channels = 6

    def __init__(self, source, length, where):
        self.source, self.length = source, length

    def encode(self, texts):
        return np.stack([np.full((self.length, 6), len(text), np.float32) for text in texts])


def test_a_caption_becomes_pictures_where_there_is_a_text_encoder(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "TextEncoder", Encoder)
    tokenizer = tiny()
    network = {"kind": "next_token", "codebook_size": 16, "rows": 4, "columns": 4, "layers": 1, "heads": 2, "width": 16}
    network |= {"condition": {"kind": "text", "features": 6, "length": 3}}
    table = {"transformer": network, "tokenizer": tokenizer.fingerprint()}
    Generator(read_config(table, "the test")).save_pretrained(tmp_path / "text", tokenizer=tokenizer)
    for encoder, state in (("clip", "done"), (None, "failed")):
        with TestClient(make_app(Library([tmp_path / "text"], text_encoder=encoder)), base_url=HERE) as client:
            assert client.get("/api/models/text").json()["captions"] is True
            started = client.post("/api/models/text/generate", json={"caption": "an owl", "count": 2}).json()
            job = finished(client, started)
            assert job["state"] == state, job["error"]
            if encoder is None:
                assert "--text-encoder" in job["error"]
            else:
                assert len(job["result"]["images"]) == 2
                empty = client.post("/api/models/text/generate", json={"caption": " "}).json()
                assert "write a caption" in finished(client, empty)["error"]


def test_two_visitors_do_not_see_each_other(app):
    with TestClient(app, base_url=HERE) as one, TestClient(app, base_url=HERE) as other:
        mine = one.post("/api/models/a/reconstruct", content=photo()).json()
        other.post("/api/models/a/reconstruct?example=1").json()
        again = one.post("/api/models/a/reconstruct", content=photo()).json()
        assert mine["indices"] == again["indices"]
        job = one.post("/api/models/generator/generate", json={}).json()
        assert other.get("/api/jobs/" + "0" * 16).status_code == 400  # numbers cannot be guessed
        assert finished(one, job)["state"] == "done"


# ---------------------------------------------------------------------------------------------- whom it refuses


def test_a_foreign_host_is_refused(client):  # DNS rebinding
    answer = client.get("/api/studio", headers={"host": "evil.example"})
    assert (answer.status_code, "error" in answer.json()) == (403, True)
    for host in ("localhost:7860", "127.0.0.1:7860", "[::1]:7860"):
        assert client.get("/api/studio", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:9999", "http://localhost"])
def test_a_page_of_another_origin_is_refused(client, origin):
    answer = client.post("/api/models/a/reconstruct", content=photo(), headers={"origin": origin})
    assert answer.status_code == 403


def test_a_browser_that_says_cross_site_is_refused_but_for_the_page_itself(client):
    elsewhere = {"sec-fetch-site": "cross-site"}
    assert client.get("/api/studio", headers=elsewhere).status_code == 403
    assert client.get("/", headers=elsewhere).status_code == 200  # a link to the studio


def test_its_own_page_is_let_in(client):
    headers = {"origin": HERE, "sec-fetch-site": "same-origin"}
    assert client.post("/api/models/a/reconstruct", content=photo(), headers=headers).status_code == 200


@pytest.mark.parametrize(
    "name",
    ["../app.py", "..%2fapp.py", "%2e%2e/app.py", "....//app.py", "/etc/passwd", "..%5capp.py", "index.html%00.js"],
)
def test_no_file_but_the_packages_own_can_be_read(client, name):
    assert client.get(f"/static/{name}").status_code == 404


@pytest.mark.parametrize("key", ["..", "%2e%2e", "..%2frun", "/etc", "nothing"])
def test_no_folder_but_the_named_ones_can_be_read(client, key):
    assert client.get(f"/api/models/{key}").status_code in (400, 404)


def test_a_picture_with_too_many_bytes_is_refused_before_it_is_read(client, monkeypatch):
    monkeypatch.setattr(pictures, "UPLOAD_BYTES", 1000)
    answer = client.post("/api/models/a/reconstruct", content=b"\0" * 1001)
    assert (answer.status_code, "limit" in answer.json()["error"]) == (413, True)

    def stream():  # no length announced
        yield from (b"\0" * 600 for _ in range(2))

    assert client.post("/api/models/a/reconstruct", content=stream()).status_code == 413


def test_a_picture_with_too_many_pixels_is_refused(client, monkeypatch):
    monkeypatch.setattr(pictures, "UPLOAD_PIXELS", 100)
    answer = client.post("/api/models/a/reconstruct", content=photo())
    assert answer.status_code == 400
    assert "more than 100 pixels" in answer.json()["error"]
    assert "recipe" not in answer.json()["error"]


@pytest.mark.parametrize(
    "data", [b"", b"GIF89a", b"<svg/>", b"%PDF-1.4", b"\x89PNG\r\n\x1a\n" + b"\0" * 40, photo()[:200]]
)
def test_what_is_no_picture_gets_a_sentence(client, data):
    answer = client.post("/api/models/a/reconstruct", content=data)
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(("the picture cannot be read", "no picture arrived"))


@pytest.mark.parametrize(
    "request_",
    [
        {"indices": [99] * 16, "shape": [4, 4]}, {"indices": [0] * 15, "shape": [4, 4]}, {"indices": "x", "shape": [4]},
        {"indices": [0.5] * 16, "shape": [4, 4]}, {"indices": [True] * 16, "shape": [4, 4]}, {"shape": [4, 4]},
        {"indices": [0] * 16, "shape": [-4, -4]}, {"indices": [], "shape": []}, {"indices": [2**70], "shape": [1, 1]},
    ],
)  # fmt: skip
def test_what_are_no_tokens_gets_a_sentence(client, request_):
    answer = client.post("/api/models/a/decode", json=request_)
    assert (answer.status_code, list(answer.json())) == (400, ["error"])


@pytest.mark.parametrize("text", [b"{", b"[1]", b"[" * 100_000, b"\xff"])
def test_what_is_no_json_object_gets_a_sentence(client, text):
    assert client.post("/api/models/a/decode", content=text).status_code == 400


@pytest.mark.parametrize(
    "address", ["codes?page=99", "codes?page=x", "codes?order=size", "codes/16", "codes?book=1", "examples/999"]
)
def test_what_is_out_of_range_gets_a_sentence(client, address):
    answer = client.get(f"/api/models/a/{address}")
    assert (answer.status_code, list(answer.json())) == (400, ["error"])


def test_a_shared_studio_needs_its_token(folder):
    app = make_app(Library([folder / "a"]), hosts=None, token="secret")
    with TestClient(app, base_url="http://lab.example:7860", follow_redirects=False) as client:
        assert client.get("/").status_code == 401
        assert client.get("/?token=wrong").status_code == 401
        assert client.get("/api/studio", headers={"authorization": "Bearer wrong"}).status_code == 401
        opened = client.get("/?token=secret")
        assert (opened.status_code, opened.headers["location"]) == (303, "/")
        assert "httponly" in opened.headers["set-cookie"].lower()
        assert client.cookies[COOKIE] == "secret"
        assert client.get("/api/studio").status_code == 200


def test_a_studio_for_any_host_without_a_token_cannot_be_made():
    from lexel.studio.guard import Guard

    with pytest.raises(ValueError, match="token"):
        Guard(lambda *_: None, hosts=None)


def test_the_page_may_load_nothing_from_elsewhere(client):
    page = client.get("/")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    assert "http" not in page.text.replace("http-equiv", "")
    for name in ("report.css", "studio.css", "app.js", "lib.js"):
        assert "url(http" not in client.get(f"/static/{name}").text


def test_a_fault_of_the_studio_shows_no_traceback(folder, monkeypatch):
    from lexel.studio import views

    def broken(*_):
        raise RuntimeError("inner detail")

    monkeypatch.setattr(views, "facts", broken)
    with TestClient(make_app(Library([folder / "a"])), base_url=HERE, raise_server_exceptions=False) as client:
        answer = client.get("/api/models/a")
    assert answer.status_code == 500
    assert "inner detail" not in answer.text
