"""timm's published weights: out of the local cache without asking the network, else downloaded."""

import socket
import urllib.parse
import urllib.request
from typing import Any

from torch import nn

from fit3d_ns.features.backbones import BackboneDescription, create_timm_model
from fit3d_ns.features.sources import RANDOM_PREFIX


def download_timm_model(description: BackboneDescription) -> nn.Module:
    """Builds a backbone with the weights that timm publishes for it.

    Raises:
        ValueError: The weights are not on this machine and cannot be downloaded.
    """
    cached = find_cached_weights(description)
    cause: Exception | None = None
    problem = "" if cached else _find_network_problem()
    if not problem:
        try:
            return create_timm_model(
                description.architecture,
                description.model_args,
                pretrained=True,
                # A custom loader reads the format of the original download, not what the hub keeps.
                pretrained_cfg_overlay={"file": cached, "custom_load": False} if cached else {},
            )
        except ValueError:
            raise
        except Exception as error:  # The hub's client has errors of several libraries, by version.
            problem, cause = _summarize(error), error
    place = f"in {cached} cannot be used" if cached else "are not on this machine and cannot be downloaded"
    raise ValueError(
        f"The weights of {description.architecture} {place} ({problem}); "
        f"give --backbone-weights FILE, or {RANDOM_PREFIX}{description.backbone} to go on with random weights."
    ) from cause


def find_cached_weights(description: BackboneDescription) -> str | None:
    """Where an earlier download of a timm backbone lies, or None.

    Found files are used as they are: asking the hub first costs most of a minute where there is no network.
    """
    from huggingface_hub import try_to_load_from_cache
    from timm.models import get_pretrained_cfg

    config: Any = get_pretrained_cfg(description.architecture)
    if config is None or not config.hf_hub_id or config.custom_load == "hf":
        return None
    cached = try_to_load_from_cache(config.hf_hub_id, config.hf_hub_filename or "model.safetensors")
    return cached if isinstance(cached, str) else None


def _find_network_problem() -> str:
    """Empty if the hub answers or may be reached through a proxy; the hub's own client retries for most of a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    url = urllib.parse.urlparse(constants.ENDPOINT)
    if urllib.request.getproxies():
        return ""
    try:
        with socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout=10):
            return ""
    except OSError as error:
        return f"no connection to {url.hostname}: {error}"


def _summarize(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].rstrip('.')}" if lines else type(error).__name__
