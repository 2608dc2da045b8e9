"""Encoders of Hugging Face of any kind, from a local folder or the hub.

Code in a model's repository is never run: `trust_remote_code` is not passed on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from tl_modules.backbones.weights import StateDict
from tl_modules.checkpoints.files import fill_in
from tl_modules.errors import UserError

# entries of an encoder's config that do not describe the network, and its path on somebody's machine
UNSAID = ("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version")


def folder_or_name(name: Path | str) -> str:
    """Expands ~ and $VARIABLES in a folder; returns a hub name as it is."""
    folder = fill_in(name)
    return str(folder if folder.is_dir() else name)


def architecture_of(where: str) -> dict[str, Any]:
    """Returns an encoder's Hugging Face config as a dict."""
    from transformers import AutoConfig

    said = json.loads(fetched(AutoConfig.from_pretrained, where).to_json_string(use_diff=True))
    return {key: value for key, value in said.items() if key not in UNSAID}


def default_weights(entry: str, where: str, config: Any) -> StateDict:
    """Returns the weights that DEFAULT means for an encoder.

    Raises:
        UserError: The entry is not DEFAULT, or the weights are not available.
    """
    from transformers import AutoModel

    if entry != "DEFAULT":
        raise UserError(f"weights: {entry} is not a file or run; DEFAULT stands for the weights of {where}")
    loaded = fetched(AutoModel.from_pretrained, where, dtype=torch.float32, config=config)
    return cast(StateDict, encoder_of(loaded).state_dict())


def encoder_of(model: Any) -> nn.Module:
    """Returns the encoder of an encoder-decoder, without a pooler, which only its own loss would train."""
    found: Any = model.get_encoder() if model.config.is_encoder_decoder else model
    if getattr(found, "pooler", None) is not None:
        found.pooler = None
    return cast(nn.Module, found)


def positions(model: nn.Module) -> int | None:
    """Returns how many tokens an encoder's position embeddings cover, or None if it has none."""
    for name, table in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(table, nn.Embedding):
            return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
    return None


def fetched(load: Callable[..., Any], where: str, network: bool = True, **options: Any) -> Any:
    """Calls `from_pretrained` on a folder or the hub's local cache, otherwise on the hub.

    Raises:
        UserError: The model is not available, or transformers does not know it.
    """
    for local in (True, False):
        try:
            if local or (network and not Path(where).is_dir() and _hub_answers()):
                return load(where, local_files_only=local, **options)
        except Exception as error:  # each kind of file has exceptions of its own; the cause is the same
            reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
    if Path(where).is_dir():
        raise UserError(f"name: {where} is not an encoder of Hugging Face that can be loaded ({reason[:200]})")
    raise UserError(
        f"name: {where} is not a folder, and could not be fetched from Hugging Face's hub ({reason[:200]}); without a "
        f"network, run `hf download {where} --local-dir FOLDER` elsewhere and pass --model.backbone.name FOLDER"
    )


def _hub_answers() -> bool:
    """Returns whether the hub can be reached, checked once: its client retries six times, for 20 seconds."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # its type depends on the client's version
        return False
    return True
