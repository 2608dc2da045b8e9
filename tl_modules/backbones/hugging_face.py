"""Encoders of Hugging Face, from a local folder or the hub, whatever they read.

No code of a model's repository is run, `trust_remote_code` is never passed on.
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

# of an encoder's config what says nothing of the network, and its path on somebody's machine
UNSAID = ("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version")


def folder_or_name(name: Path | str) -> str:
    """A folder with ~ and $VARIABLES filled in, or what is none, the name on the hub, as it is."""
    folder = fill_in(name)
    return str(folder if folder.is_dir() else name)


def architecture_of(where: str) -> dict[str, Any]:
    """What an encoder is, in the words of its config."""
    from transformers import AutoConfig

    said = json.loads(fetched(AutoConfig.from_pretrained, where).to_json_string(use_diff=True))
    return {key: value for key, value in said.items() if key not in UNSAID}


def default_weights(entry: str, where: str, config: Any) -> StateDict:
    """The weights that belong to an encoder, which DEFAULT stands for.

    Raises:
        UserError: It is another entry, or they cannot be had.
    """
    from transformers import AutoModel

    if entry != "DEFAULT":
        raise UserError(f"weights: {entry} is no file or run; DEFAULT stands for the weights of {where}")
    loaded = fetched(AutoModel.from_pretrained, where, dtype=torch.float32, config=config)
    return cast(StateDict, encoder_of(loaded).state_dict())


def encoder_of(model: Any) -> nn.Module:
    """The encoder of an encoder and decoder, without a pooler, which no other loss would train."""
    found: Any = model.get_encoder() if model.config.is_encoder_decoder else model
    if getattr(found, "pooler", None) is not None:
        found.pooler = None
    return cast(nn.Module, found)


def positions(model: nn.Module) -> int | None:
    """How many tokens an encoder's table of positions is for, which may begin behind its padding; None without one."""
    for name, table in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(table, nn.Embedding):
            return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
    return None


def fetched(load: Callable[..., Any], where: str, network: bool = True, **options: Any) -> Any:
    """What `from_pretrained` gives of a folder or what was fetched before, or else fetches now.

    Raises:
        UserError: It cannot be had, or transformers does not know it.
    """
    for local in (True, False):
        try:
            if local or (network and not Path(where).is_dir() and _hub_answers()):
                return load(where, local_files_only=local, **options)
        except Exception as error:  # each kind of file has exceptions of its own; the cause is the same
            reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
    if Path(where).is_dir():
        raise UserError(f"name: {where} is no encoder of Hugging Face that can be loaded ({reason[:200]})")
    raise UserError(
        f"name: {where} is no folder, and could not be fetched from the Hugging Face hub ({reason[:200]}); without a "
        f"network, run `hf download {where} --local-dir FOLDER` elsewhere and pass --model.backbone.name FOLDER"
    )


def _hub_answers() -> bool:
    """Whether the hub can be reached, asked once: its client asks six times before it gives up, for 20 seconds."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # the client's own kind, which changes with its version
        return False
    return True
