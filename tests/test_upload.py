"""Folders sent to Kaggle and to the Hub: the real clients against servers on loopback,
which keep what arrives.
"""

import json
import os
import re
import shutil
import time
from pathlib import Path

import keras_hub
import numpy as np
import pytest
from hub_server import HANG_UP, RESET, HubServer, Response, hub_of_this_process
from kaggle_server import KaggleServer, serving
from safetensors.numpy import save_file

import gemma_lora as gl
from gemma_lora.access.fetch import AccessError
from gemma_lora.access.kaggle import THREE_WAYS
from gemma_lora.formats.upload import Upload
from gemma_lora.models import TINY_FOLDER

HANDLE, REPO = "ada/tiny-lora/keras/trips_v1.0", "ada/tiny_lora"
URI = {"kaggle": f"kaggle://{HANDLE}", "hf": f"hf://{REPO}"}
PAGE = {"kaggle": f"https://www.kaggle.com/models/{HANDLE}", "hf": f"https://huggingface.co/{REPO}"}
ADA, EVE, NOBODY = "KGAT_ada_secret", "KGAT_eve_secret", "KGAT_nobody_secret"
HF_ADA, HF_EVE, HF_NOBODY = "hf_ada_secret", "hf_eve_secret", "hf_nobody_secret"
TOKENS = {
    "kaggle": {"ada": ADA, "eve": EVE, "nobody": NOBODY},
    "hf": {"ada": HF_ADA, "eve": HF_EVE, "nobody": HF_NOBODY},
}
SECRETS = (ADA, EVE, NOBODY, HF_ADA, HF_EVE, HF_NOBODY, "s3cret")
CARD = "---\nlicense: apache-2.0\n---\nAn adapter for trips – größer, 日本.\n"
SITES = ("kaggle", "hf")
TENSOR = {"a": np.arange(3000, dtype="float32")}
CLUTTER = (
    ".env",
    ".git/config",
    ".cache/huggingface/token",
    "kaggle.json",
    "access_token.json",
    "Client_Secret.json",
    "google-credentials.json",
    "step_10.part",
    "checkpoint.weights.h5",
    "checkpoints/step_5/adapter.safetensors",
    "optimizer.pt",
    "notes.txt",
    "train.py",
    "assets/.DS_Store",
    "assets/old.part",
    "[ab].txt",
    "assets/token.json",
)
LEFT_OUT = (
    ".cache/",
    ".env",
    ".git/",
    "Client_Secret.json",
    "[ab].txt",
    "access_token.json",
    "assets/.DS_Store",
    "assets/old.part",
    "assets/token.json",
    "checkpoint.weights.h5",
    "checkpoints/",
    "google-credentials.json",
    "kaggle.json",
    "notes.txt",
    "optimizer.pt",
    "step_10.part",
    "train.py",
)


class Kaggle:
    """Kaggle, and how what it has is read from outside."""

    site = "kaggle"

    def __init__(self, server):
        self.server = server

    def versions(self) -> list[dict[str, bytes]]:
        return self.server.versions_of.get(HANDLE, [])

    def everything(self) -> list[bytes]:
        return [blob["content"] for blob in self.server._blobs]

    def sign_in(self, name: str | None):
        os.environ.pop("KAGGLE_API_TOKEN", None)
        if name:
            os.environ["KAGGLE_API_TOKEN"] = f"KGAT_{name}_secret"


class Hub:
    """The Hub, likewise."""

    site = "hf"

    def __init__(self, server):
        self.server = server

    def versions(self) -> list[dict[str, bytes]]:
        return [brought for repo, brought in self.server.commits if repo == REPO]

    def everything(self) -> list[bytes]:
        return [
            *self.server._large.values(),
            *(one for files in self.versions() for one in files.values()),
        ]

    def sign_in(self, name: str | None):
        os.environ.pop("HF_TOKEN", None)
        if name:
            os.environ["HF_TOKEN"] = f"hf_{name}_secret"


@pytest.fixture(params=SITES)
def site(request, tmp_path, monkeypatch):
    """Each site in turn, ada signed in; nobody waits, or has credentials in files."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setenv("HF_TOKEN", "to be put back")
    if request.param == "kaggle":
        server = KaggleServer()
        server.users, server.consented = {ADA: "ada", EVE: "eve"}, {"ada"}
        with serving(server, tmp_path / "cache"):
            found = Kaggle(server)
            found.sign_in("ada")
            yield found
    else:
        server = HubServer()
        server.users = {HF_ADA: "ada", HF_EVE: "eve"}
        with hub_of_this_process(server, tmp_path / "hub"):
            found = Hub(server)
            found.sign_in("ada")
            yield found


def put(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def adapter(folder: Path, base: str = "tiny_gemma_en") -> Path:
    put(folder, {"adapter.json": json.dumps({"format": 1, "base": base}), "README.md": CARD})
    save_file(TENSOR, folder / "adapter.safetensors")
    return folder


def preset(folder: Path) -> Path:
    return shutil.copytree(TINY_FOLDER, folder)


def transformers(folder: Path) -> Path:
    config = {"architectures": ["GemmaForCausalLM"], "vocab_size": 256000}
    names = (
        "generation_config.json",
        "tokenizer_config.json",
        "added_tokens.json",
        "special_tokens_map.json",
    )
    put(
        folder,
        {
            "config.json": json.dumps(config),
            "README.md": CARD,
            "LICENSE": "Terms",
            "NOTICE.txt": "Gemma is",
        },
    )
    put(
        folder,
        {
            **dict.fromkeys(names, "{}"),
            "tokenizer.model": bytes(range(256)),
            "chat_template.jinja": "{{ bos }}",
        },
    )
    save_file(TENSOR, folder / "model-00001-of-00002.safetensors")
    save_file(TENSOR, folder / "model[1].safetensors")
    return folder


def peft(folder: Path) -> Path:
    put(
        folder,
        {
            "adapter_config.json": json.dumps({"base_model_name_or_path": "google/gemma-2b"}),
            "README.md": CARD,
        },
    )
    save_file(TENSOR, folder / "adapter_model.safetensors")
    return folder


KINDS = {
    "an adapter": adapter,
    "a preset": preset,
    "for Transformers": transformers,
    "for PEFT": peft,
}


def content_of(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def refused(folder, uri, **options) -> AccessError:
    """Send what cannot be sent: one clear sentence, with nothing in it or behind it
    that nobody should see.
    """
    with pytest.raises(AccessError) as raised:
        gl.upload(folder, uri, **options)
    error, sentence = raised.value, str(raised.value)
    assert error.__cause__ is None and error.__context__ is None
    assert not any(secret in sentence + repr(error) for secret in SECRETS), sentence
    own = sentence.replace(THREE_WAYS, "")
    assert own.count(". ") <= 3 and "gl.load" not in own and len(own) < 500, own
    return error


# What arrives


@pytest.mark.parametrize("kind", KINDS)
def test_every_byte_of_a_model_arrives_and_nothing_else(site, tmp_path, kind, capsys):
    folder = KINDS[kind](tmp_path / "model")
    expected = content_of(folder)
    put(folder, {name: f"not for others: {name}" for name in CLUTTER})
    planned = gl.upload(folder, URI[site.site], dry_run=True)
    assert site.server.requests == []
    result = gl.upload(folder, URI[site.site])

    assert site.versions() == [expected]
    assert not any(b"not for others" in content for content in site.everything())
    assert result.files == {name: len(content) for name, content in expected.items()}
    assert result.left_out == LEFT_OUT
    assert result.url == PAGE[site.site] and result.sent and not planned.sent
    assert vars(planned) | {"sent": True} == vars(result)
    shown = str(result)
    assert shown.startswith(f"Sent to {PAGE[site.site]}") and "kaggle.json" in shown
    assert re.search(rf"\nall +{sum(map(len, expected.values())):,}$", shown)
    assert "dry run" in str(planned) and "<table>" in planned._repr_html_()
    printed = capsys.readouterr()
    assert not any(secret in printed.out + printed.err + shown for secret in SECRETS)


def test_a_model_that_was_sent_is_loaded_from_there(site, tmp_path):
    gl.upload(preset(tmp_path / "model"), URI[site.site])
    if site.site == "kaggle":
        site.server.presets["trips_v1.0"] = put(tmp_path / "served", site.versions()[0])
    model = keras_hub.models.CausalLM.from_preset(URI[site.site], dtype="float32")
    expected = gl.load().get_weights()
    assert all(
        np.array_equal(one, other) for one, other in zip(model.get_weights(), expected, strict=True)
    )


def test_a_second_time_makes_a_new_version(site, tmp_path):
    folder = adapter(tmp_path / "model")
    gl.upload(folder, URI[site.site])
    save_file({"a": TENSOR["a"] + 1}, folder / "adapter.safetensors")
    gl.upload(folder, URI[site.site])
    first, second = site.versions()
    assert (
        first["adapter.safetensors"]
        != second["adapter.safetensors"]
        == (folder / "adapter.safetensors").read_bytes()
    )
    if site.site == "hf":
        # what is there already is not sent again
        assert second.keys() == {"adapter.safetensors"}
        assert site.server.models[REPO] == content_of(folder)
    gl.upload(folder, URI[site.site])  # and unchanged it is no error


def test_what_is_new_is_private(site, tmp_path):
    gl.upload(adapter(tmp_path / "model"), URI[site.site])
    assert site.server.private == ({"ada/tiny-lora": True} if site.site == "kaggle" else {REPO})


@pytest.mark.parametrize(
    ("make", "licence", "name"),
    [
        (adapter, "Apache-2.0", "Apache 2.0"),
        (preset, "Apache-2.0", "Apache 2.0"),
        (lambda folder: adapter(folder, "gemma_2b_en"), "ai.google.dev/gemma/terms", None),
        (transformers, "ai.google.dev/gemma/terms", None),
        (peft, "ai.google.dev/gemma/terms", None),
    ],
)
def test_the_licence_is_that_of_the_base(site, tmp_path, make, licence, name):
    result = gl.upload(make(tmp_path / "model"), URI[site.site])
    assert licence in result.licence and licence in str(result)
    if site.site == "kaggle":
        assert site.server.licences == {HANDLE: name}


# The card


def test_a_card_is_written_sent_and_not_replaced(site, tmp_path):
    folder, uri = adapter(tmp_path / "model"), URI[site.site]
    (folder / "README.md").unlink()
    planned = gl.upload(folder, uri, dry_run=True, card=CARD)
    assert planned.files["README.md"] == len(CARD.encode()) and not (folder / "README.md").exists()
    assert gl.upload(folder, uri, card=CARD).files == planned.files
    assert site.versions()[0]["README.md"] == CARD.encode() == (folder / "README.md").read_bytes()
    gl.upload(folder, uri, card=CARD)
    with pytest.raises(ValueError, match="not replaced"):
        gl.upload(folder, uri, card="Another.")
    assert content_of(folder)["README.md"] == CARD.encode()
    assert not list(folder.glob("*.part"))


# What is refused before anything is sent


def without_card(folder):
    (adapter(folder) / "README.md").unlink()


def with_a_token(folder):
    put(adapter(folder), {"config.json": json.dumps({"run": f"{ADA} {HF_ADA}"})})


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda folder: None, FileNotFoundError, "There is no folder"),
        (lambda folder: folder.mkdir(), ValueError, "no weights"),
        (
            lambda folder: put(folder, {"README.md": CARD, "adapter.json": "{}"}),
            ValueError,
            "no weights",
        ),
        (
            lambda folder: put(folder, {"optimizer.pt": "1", "README.md": CARD}),
            ValueError,
            "no weights",
        ),
        (without_card, ValueError, r"card=gl\.model_card\(model\)"),
        (with_a_token, ValueError, "config.json holds a token"),
        (
            lambda folder: put(adapter(folder), {"adapter.json": "{"}),
            ValueError,
            "adapter.json cannot be read",
        ),
        (
            lambda folder: put(adapter(folder), {"adapter.json": '{"base": 3}'}),
            ValueError,
            "cannot be read",
        ),
        (
            lambda folder: put(adapter(folder), {"config.json": '{"config": null}'}),
            ValueError,
            "cannot be read",
        ),
    ],
)
def test_a_folder_that_is_no_model_is_refused(site, tmp_path, make, error, words, dry_run):
    make(tmp_path / "model")
    with pytest.raises(error, match=words) as raised:
        gl.upload(tmp_path / "model", URI[site.site], dry_run=dry_run)
    assert not any(secret in str(raised.value) for secret in SECRETS)
    assert site.server.requests == []


@pytest.mark.parametrize(
    "uri",
    [
        "",
        None,
        "ada/tiny",
        "hf://ada",
        "hf://",
        "hf://ada/tiny/more",
        "hf://a da/tiny",
        "hf://ada/..",
        "s3://ada/tiny",
        "kaggle://ada/tiny",
        f"kaggle://{HANDLE}/3",
        "kaggle://ada/tiny/keras/",
        "kaggle://ada/tiny/karas/trips",
        "https://huggingface.co/ada/tiny",
        "hf://ada/tiny\n",
    ],
)
def test_an_address_that_is_none_is_refused(tmp_path, uri):
    with pytest.raises(ValueError, match=r"hf://OWNER/NAME|ModelFramework|Repo id"):
        gl.upload(adapter(tmp_path / "model"), uri, dry_run=True)


def test_a_link_to_elsewhere_is_not_followed(tmp_path):
    (tmp_path / "private.json").write_text('{"mine": "alone"}')
    folder = adapter(tmp_path / "mine")
    (folder / "settings.json").symlink_to(tmp_path / "private.json")
    planned = gl.upload(folder, "hf://ada/mine", dry_run=True)
    assert "settings.json" in planned.left_out and "settings.json" not in planned.files


def test_card_and_upload_agree_on_the_licence_of_an_adapter_for_peft(tiny_lora, tmp_path):
    gl.export_peft(tiny_lora, tmp_path)
    assert "license: apache-2.0" in (tmp_path / "README.md").read_text()
    assert gl.upload(tmp_path, "hf://ada/mine", dry_run=True).licence.startswith(
        "Licence: Apache-2.0"
    )


def test_a_dry_run_needs_no_credentials_and_writes_nothing(site, tmp_path):
    site.sign_in(None)
    site.server.stop()
    folder = adapter(tmp_path / "model")
    before = content_of(folder)
    assert isinstance(gl.upload(folder, URI[site.site], dry_run=True), Upload)
    assert content_of(folder) == before and site.server.requests == []


# What goes wrong on the way


@pytest.mark.parametrize("user", [None, "nobody", "eve"])
def test_who_may_not_send_is_told_why(site, tmp_path, user):
    folder = adapter(tmp_path / "model")
    site.sign_in(user)
    error = refused(folder, URI[site.site])
    assert error.reason == ("consent" if user == "eve" else "credentials")
    words = {None: "none was found", "nobody": "does not accept", "eve": "write to 'ada' (403)"}[
        user
    ]
    assert words in str(error)
    assert (site.server.requests == []) == (user is None)
    site.sign_in("ada")
    gl.upload(folder, URI[site.site])
    assert site.versions() == [content_of(folder)]


FAULTS = {
    "429": (429, "busy", "429"),
    "503": (503, "server", "503"),
    "reset": (RESET, "network", "cannot be reached, or stopped answering"),
    "hung up": (HANG_UP, "network", "cannot be reached, or stopped answering"),
}


@pytest.mark.parametrize(
    ("fault", "after"),
    [
        pytest.param(fault, after, marks=[] if after == number else [pytest.mark.full])
        for number, fault in enumerate(FAULTS)
        for after in range(4)
    ],
)
def test_a_site_that_fails_on_the_way_is_named_and_then_all_goes_well(
    site, tmp_path, monkeypatch, fault, after
):
    folder = adapter(tmp_path / "model")
    how, reason, words = FAULTS[fault]
    respond = site.server.respond

    def failing(*asked):
        if len(site.server.requests) >= after:
            site.server.failing = {"": how}
        return respond(*asked)

    monkeypatch.setattr(site.server, "respond", failing)
    error = refused(folder, URI[site.site])
    if (
        how in (429, 503) and site.site == "kaggle" and after == 3
    ):  # the client says no more than the number
        reason, words = "unknown", str(how)
    if how in (429, 503) and any(
        "validate-yaml" in what for what, _ in site.server.requests[-1:]
    ):  # nor here that
        reason, words = "server", "answered with a web page"
    assert error.reason == reason and words in str(error), str(error)
    assert site.versions() == []
    monkeypatch.setattr(site.server, "respond", respond)
    site.server.failing = {}
    gl.upload(folder, URI[site.site])
    assert site.versions() == [content_of(folder)]


def test_where_nobody_listens_the_network_is_named(site, tmp_path):
    site.server.stop()
    error = refused(adapter(tmp_path / "model"), URI[site.site])
    assert error.reason == "network" and "proxy" in str(error)


@pytest.mark.parametrize("site", ["kaggle"], indirect=True)
def test_a_file_that_broke_off_goes_on_where_it_ended(site, tmp_path):
    site.server.failing = {"adapter.safetensors": [RESET, RESET]}
    folder = adapter(tmp_path / "model")
    gl.upload(folder, URI["kaggle"])
    assert site.versions() == [content_of(folder)]


@pytest.mark.parametrize("site", ["kaggle"], indirect=True)
def test_a_file_that_never_arrives_whole_makes_no_version(site, tmp_path):
    site.server.failing = {"adapter.safetensors": RESET}
    error = refused(adapter(tmp_path / "model"), URI["kaggle"])
    assert "not been uploaded completely" in str(error) or error.reason == "network"
    assert site.versions() == []


def test_a_login_page_instead_of_the_site_is_named(site, tmp_path, monkeypatch):
    page = Response(
        200, {"Content-Type": "text/html"}, b"<!doctype html><title>Please log in</title>"
    )
    monkeypatch.setattr(site.server, "respond", lambda *asked: page)
    error = refused(adapter(tmp_path / "model"), URI[site.site])
    assert error.reason == "server" and "login" in str(error)


@pytest.mark.parametrize("site", ["hf"], indirect=True)
def test_a_head_of_the_card_that_the_hub_cannot_read_is_named(site, tmp_path):
    folder = adapter(tmp_path / "model")
    put(folder, {"README.md": b"---\n" + HubServer.bad_card + b"\n---\n"})
    error = refused(folder, URI["hf"])
    assert "Invalid metadata in README.md" in str(error)
    assert site.versions() == []
