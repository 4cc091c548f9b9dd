"""`fit3d-push`: a fine-tuned folder as a model on Hugging Face's hub. Nothing is sent without `--yes`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from huggingface_hub import CommitOperationAdd, HfApi, get_token, metadata_load
from huggingface_hub.utils import validate_repo_id

from fit3d_ns.cli.command import create_main
from fit3d_ns.features import describe_backbone
from fit3d_ns.features.sources import ADAPTER_NAME, WEIGHTS_NAME
from fit3d_ns.finetuning.backbone_folder import UNKNOWN
from fit3d_ns.utils.errors import first_line

_CARD = "README.md"
_PUSHED = (_CARD, "config.json", WEIGHTS_NAME, ADAPTER_NAME, "fit3d.pth", "LICENSE", "LICENSE.md")
"""Files of a fine-tuned folder, and of its mixtures, that others need; report and comparison are of this machine."""
_REFUSALS = {
    401: "it does not know the token (any more); `hf auth login` stores another",
    403: "the token may not write there; make one with write access, or choose a name of your own account",
    409: "it exists already; choose another name, or add a commit to it with --overwrite",
}
"""What the hub's status codes mean for the user."""


@dataclass(frozen=True)
class PushCommand:
    """What is shared, and under which name."""

    folder: tyro.conf.Positional[Path]
    """A folder that fit3d-finetune wrote."""
    name: tyro.conf.Positional[str]
    """Where to: USER/NAME or ORGANISATION/NAME on the hub (another one by HF_ENDPOINT)."""
    yes: bool = False
    """Really send. Without it, only say what would be sent."""
    private: bool = False
    """Make a repository that only you, or your organisation, can see."""
    overwrite: bool = False
    """Add a commit to a repository that exists; its visibility stays as it is."""


def push(command: PushCommand) -> None:
    folder, name = command.folder, command.name
    validate_repo_id(name)
    if "/" not in name:
        raise ValueError(f"{name} names no account; give USER/{name}.")
    describe_backbone(f"local-dir:{folder}")
    files = [path for part in (folder, *sorted(folder.glob("wise-ft-*"))) for path in map(part.joinpath, _PUSHED)]
    files = [path for path in files if path.is_file()]
    for path in files:
        print(f"{path.stat().st_size / 1e6:10.3f} MB  {path.relative_to(folder)}")
    others = sorted(path.name for path in folder.iterdir() if path not in files and "wise-ft-" not in path.name)
    print(f"Stays here: {', '.join(others) or 'nothing'}.")
    if (metadata_load(folder / _CARD) or {}).get("license", UNKNOWN) == UNKNOWN:
        print(f"The card names no licence: nobody may use the weights. Add `license: ...` to {folder / _CARD}.")
    where = f"{'a private' if command.private else 'the public'} model {name} of {HfApi().endpoint}"
    if not command.yes:
        print(f"Nothing was sent. With --yes this becomes {where}.")
        return
    if get_token() is None:
        raise ValueError("There is no token for the hub; `hf auth login` stores one, or set HF_TOKEN (write access).")
    url = send(folder, files, name, command.private, command.overwrite)
    use = f'timm.create_model("hf-hub:{name}", pretrained=True)'
    if (folder / ADAPTER_NAME).is_file():
        use = "fit3d_ns.features.create_extractor(FOLDER), once it is downloaded; timm knows no adapters"
    print(f"Sent: {url}\nTo use it: {use}")


def send(folder: Path, files: Sequence[Path], name: str, private: bool, overwrite: bool) -> str:
    """Makes the repository and its one commit, and returns its address; ValueError for whatever the hub refuses."""
    api = HfApi(library_name="fit3d-ns")
    additions = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]
    try:
        url = api.create_repo(name, private=private, exist_ok=overwrite)
        api.create_commit(name, additions, commit_message="Fine-tuned with fit3d-ns")
    except Exception as error:
        # Each generation of the hub's library has another HTTP library, with exceptions of its own.
        cause = error.__cause__ or error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        reason = _REFUSALS.get(status or 0) or f"{first_line(cause)}; check the network, then push with --overwrite"
        raise ValueError(f"{api.endpoint} did not take {name}: {reason}.") from error
    return str(url)


main = create_main("fit3d-push", PushCommand, push)
