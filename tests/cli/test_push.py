"""`fit3d-push` against a hub on this machine that speaks as much of its API as a commit takes."""

import base64
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import huggingface_hub
import pytest
import timm
import torch

from fit3d_ns.cli import push as module
from fit3d_ns.features import create_token_model
from fit3d_ns.features.adapters import add_adapter
from fit3d_ns.features.sources import TOY_FOLDER
from fit3d_ns.finetuning.backbone_folder import save_finetuned

NAME = "somebody/vit"


@dataclass
class Hub:
    """What a hub knows: repositories with their visibility and files; tokens of `somebody` begin with hf_."""

    url: str = ""
    visibility: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    num_requests: int = 0

    def answer(self, method: str, path: str, token: str, body: bytes) -> tuple[int, dict[str, Any]]:
        self.num_requests += 1
        parts = path.strip("/").split("/")
        if parts[0] == "objects":
            self.objects[parts[1]] = body
            return 200, {}
        if not token.startswith("Bearer hf_"):
            return 401, {"error": "Invalid username or password."}
        if path == "/api/validate-yaml":
            return 200, {"warnings": [], "errors": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            if asked["organization"] != "somebody":
                return 403, {"error": "You don't have the rights to create a model under this namespace"}
            name = f"{asked['organization']}/{asked['name']}"
            if name in self.files:
                return 409, {"error": "You already created this model repo", "url": f"{self.url}/{name}"}
            self.visibility[name], self.files[name] = asked.get("visibility", asked.get("private")), {}
            return 200, {"url": f"{self.url}/{name}"}
        if path.endswith(".git/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            upload = [{"upload": {"href": f"{self.url}/objects/{file['oid']}"}} for file in wanted]
            answers = [{**file, "actions": action} for file, action in zip(wanted, upload, strict=True)]
            return 200, {"transfer": "basic", "objects": answers}
        name, what = "/".join(parts[2:4]), parts[4]
        if what == "preupload":
            modes = [
                (file["path"], "lfs" if file["size"] > 100_000 else "regular") for file in json.loads(body)["files"]
            ]
            return 200, {"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes]}
        assert what == "commit", path
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.files[name][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[name][value["path"]] = self.objects[value["oid"]]
        return 200, {"commitUrl": f"{self.url}/{name}/commit/1", "commitOid": "1" * 40, "success": True}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = self.headers.get("Authorization", "")
            status, content = hub.answer(self.command, self.path.split("?")[0], token, body)
            answer = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_PUT = do_POST

        def log_message(self, *given: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        Thread(target=server.serve_forever, daemon=True).start()
        # What HF_ENDPOINT and HF_HUB_DISABLE_XET are read into when the library is imported.
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_somebodys")
        yield hub
        server.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The package's own backbone, among what a training leaves in its folder."""
    shutil.copytree(TOY_FOLDER, tmp_path / "vit")
    for name in ("checkpoints/step.ckpt", "tensorboard/events", ".hidden", "report.json", "comparison.png", "x.tmp"):
        (tmp_path / "vit" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "vit" / name).write_text("private")
    shutil.copytree(TOY_FOLDER, tmp_path / "vit" / "wise-ft-0.5")
    (tmp_path / "vit" / "wise-ft-0.5" / "model.safetensors.1.tmp").touch()
    return tmp_path / "vit"


def fail(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        module.main(words)
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("fit3d-push: error: ") and "Traceback" not in error
    return error


def test_push__sends_what_others_need_and_timm_opens_it(
    hub: Hub, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module.main([str(folder), NAME, "--private", "--yes"])
    names = {"README.md", "config.json", "model.safetensors"}
    assert hub.files[NAME].keys() == names | {f"wise-ft-0.5/{name}" for name in names}
    assert hub.visibility[NAME] in ("private", True)
    oid = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert hub.objects.keys() == {oid} and f"Sent: {hub.url}/{NAME}" in capsys.readouterr().out
    (tmp_path / "downloaded").mkdir()
    for name in names:
        (tmp_path / "downloaded" / name).write_bytes(hub.files[NAME][name])
    images = torch.rand(1, 3, 24, 40, generator=torch.Generator().manual_seed(0))
    first, second = (
        timm.create_model(f"local-dir:{place}", pretrained=True).eval()(images)
        for place in (folder, tmp_path / "downloaded")
    )
    assert torch.equal(first, second)


def test_push__says_what_would_be_sent_and_asks_nobody(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    module.main([str(folder), NAME])
    printed = capsys.readouterr().out
    assert f"With --yes this becomes the public model {NAME} of {hub.url}." in printed and hub.num_requests == 0
    megabytes = (folder / "model.safetensors").stat().st_size / 1e6
    assert f"{megabytes:.3f} MB  model.safetensors" in printed and "licence" not in printed
    assert "Stays here: .hidden, checkpoints, comparison.png, report.json, tensorboard, x.tmp." in printed
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("license: apache-2.0\n", ""))
    module.main([str(folder), NAME])
    assert "The card names no licence" in capsys.readouterr().out


def test_push__does_not_send_people_to_timm_with_an_adapter(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapted = add_adapter(create_token_model("toy_rooms_vit"))
    save_finetuned(tmp_path / "vit", adapted, adapted.model.state_dict(), "---\nlicense: mit\n---\n", "mit")
    module.main([str(tmp_path / "vit"), NAME, "--yes"])
    printed = capsys.readouterr().out
    assert "adapter.safetensors" in hub.files[NAME] and "timm.create_model" not in printed
    assert "create_extractor" in printed


def test_push__takes_a_name_that_exists_only_when_told(
    hub: Hub, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.files[NAME] = {"README.md": b"other"}
    assert "exists already" in fail(capsys, str(folder), NAME, "--yes")
    assert hub.files[NAME] == {"README.md": b"other"}
    module.main([str(folder), NAME, "--yes", "--overwrite"])
    assert hub.files[NAME]["README.md"] == (folder / "README.md").read_bytes()


def test_push__says_in_one_sentence_why_not(
    hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "may not write there" in fail(capsys, str(folder), "another/vit", "--yes")
    assert "give USER/vit" in fail(capsys, str(folder), "vit", "--yes")
    assert "Repo id" in fail(capsys, str(folder), "some body/vit", "--yes")
    assert "no config.json" in fail(capsys, str(tmp_path), NAME, "--yes")
    monkeypatch.setenv("HF_TOKEN", "expired")
    assert "does not know the token" in fail(capsys, str(folder), NAME, "--yes")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert "hf auth login" in fail(capsys, str(folder), NAME, "--yes")
    monkeypatch.setenv("HF_TOKEN", "hf_somebodys")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "check the network" in fail(capsys, str(folder), NAME, "--yes")
    assert not hub.files
    (folder / "README.md").unlink()
    assert "README.md: no such file" in fail(capsys, str(folder), NAME)
