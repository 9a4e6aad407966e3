"""Draft directories: a draft is stored without the tensors that it shares with its target, and loaded with them.

A draft directory holds `draft.safetensors` (the new tensors, in bfloat16 or, packed, in 8 bits: see
`cloud_verifier.registry.int8`) and `draft.json` (the layout, and the identity of the target tensors that it was
trained with). The configuration and the shared tensors come from the target's checkpoint.
"""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

try:
    from transformers.modeling_utils import no_init_weights as no_init_weights
except ImportError:  # Release 5 moved it. Imported by name, as release 4 has no such module for mypy to find.
    no_init_weights = importlib.import_module("transformers.initialization").no_init_weights

from cloud_verifier.draft_models.layouts import DraftPlan, draft_config, fingerprint_shared, freeze_shared
from cloud_verifier.draft_models.safetensors_io import read_tensors
from cloud_verifier.registry.checkpoint import load_config
from cloud_verifier.registry.int8 import pack, unpack
from cloud_verifier.registry.version_files import find_tensor_files
from edge_runtime.protocol.errors import DraftError, InputError

FORMAT_VERSION = 1
WEIGHTS_FILE = "draft.safetensors"
DESCRIPTION_FILE = "draft.json"


@dataclass(frozen=True)
class DraftDescription:
    """The contents of `draft.json`.

    Attributes:
        format_version: format of the file.
        model_type: architecture of target and draft.
        plan: which blocks are new and which are shared.
        shared_identity: identity of the shared tensors, which a client presents to the verifier.
        tensors: names of the new tensors.
    """

    format_version: int
    model_type: str
    plan: DraftPlan
    shared_identity: str
    tensors: tuple[str, ...]


def save_draft(
    draft: PreTrainedModel, plan: DraftPlan, target_directory: Path, directory: Path, *, packed: bool = False
) -> None:
    """Write the draft's own tensors and their description.

    Args:
        target_directory: checkpoint of the target that the draft was trained for.
        packed: store matrices in 8 bits: half the file, for drafts that will be quantized to 8 bits or fewer anyway.

    Raises:
        DraftError: a shared tensor of `draft` differs from the target's.
    """
    shared = read_shared_tensors(target_directory, plan)
    parameters = dict(draft.named_parameters())
    for name, tensor in shared.items():
        if name in parameters and not torch.equal(parameters[name].detach().float().cpu(), tensor.float()):
            raise DraftError(f"{name} is shared with {target_directory} and was changed: freeze it and train again")
    own = {name: parameter.detach().cpu() for name, parameter in parameters.items() if name not in shared}
    stored = pack(own) if packed else {name: tensor.to(torch.bfloat16) for name, tensor in own.items()}
    description = DraftDescription(
        format_version=FORMAT_VERSION,
        model_type=draft.config.model_type,
        plan=plan,
        shared_identity=_shared_identity(shared, plan),
        tensors=tuple(sorted(own)),
    )
    directory.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in stored.items()}, directory / WEIGHTS_FILE, {"format": "pt"}
    )
    text = json.dumps(asdict(description), indent=2) + "\n"
    (directory / DESCRIPTION_FILE).write_text(text, encoding="utf-8")


def load_draft(directory: Path, target_directory: Path) -> PreTrainedModel:
    """Load the complete draft in float32 on the CPU, with its shared parameters frozen.

    Raises:
        DraftError: the directory holds no complete draft, or the draft was made for a target with other shared tensors.
        TargetError: the target's checkpoint cannot be read.
    """
    description = read_description(directory)
    plan = description.plan
    config = load_config(target_directory)
    if (config.model_type, config.num_hidden_layers) != (description.model_type, plan.target_blocks):
        raise DraftError(
            f"{directory} is a draft for a {description.model_type} of {plan.target_blocks} blocks, and "
            f"{target_directory} is a {config.model_type} of {config.num_hidden_layers}: name the right target"
        )
    shared = read_shared_tensors(target_directory, plan)
    identity = _shared_identity(shared, plan)
    if identity != description.shared_identity:
        raise DraftError(
            f"{directory} was trained with shared tensors {description.shared_identity} and {target_directory} has "
            f"{identity}: name the target that it was made for, or train a draft for this one"
        )
    try:
        own = unpack(load_file(directory / WEIGHTS_FILE))
    except (OSError, SafetensorError) as error:
        raise DraftError(f"{directory / WEIGHTS_FILE} cannot be read ({error}): copy the draft again") from None
    draft = new_draft(config, plan)
    _fill_parameters(draft, shared | own, directory)
    freeze_shared(draft, plan)
    return draft


def new_draft(config: PretrainedConfig, plan: DraftPlan) -> PreTrainedModel:
    """Make a draft for a target with this configuration, in float32 on the CPU, whose parameters have no values yet."""
    auto_model: Any = AutoModelForCausalLM  # transformers annotates few of the methods used below.
    # Random initialization of billions of weights would take longer than all the rest.
    with no_init_weights():
        draft = auto_model.from_config(draft_config(config, plan), dtype=torch.float32)
    draft.tie_weights()
    made: PreTrainedModel = draft.eval()
    return made


def read_description(directory: Path) -> DraftDescription:
    """Read `draft.json`.

    Raises:
        DraftError: there is none, or this release cannot read it.
    """
    path = directory / DESCRIPTION_FILE
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields["format_version"] != FORMAT_VERSION:
            raise DraftError(
                f"{path} has format {fields['format_version']!r} and this release reads {FORMAT_VERSION}: "
                "upgrade flexspec, or train the draft again"
            )
        fields |= {"plan": DraftPlan(**fields["plan"]), "tensors": tuple(fields["tensors"])}
        return DraftDescription(**fields)
    except FileNotFoundError:
        raise DraftError(f"no draft in {directory}: it has no {DESCRIPTION_FILE}") from None
    except (ValueError, KeyError, TypeError, InputError) as error:
        raise DraftError(f"{path} does not describe a draft ({error}): copy the draft again") from None


def read_shared_tensors(target_directory: Path, plan: DraftPlan) -> dict[str, torch.Tensor]:
    """Read the tensors that the draft shares, by their names in the draft, in the target's stored dtype."""
    names = plan.shared_tensors(find_tensor_files(target_directory))
    tensors = read_tensors(target_directory, names.values())
    return {draft_name: tensors[target_name] for draft_name, target_name in names.items()}


def _shared_identity(shared: dict[str, torch.Tensor], plan: DraftPlan) -> str:
    """Identity of the shared tensors; computed with their names in the target."""
    return fingerprint_shared({plan.origin_of(name): tensor for name, tensor in shared.items()}, plan).identity


def _fill_parameters(draft: PreTrainedModel, tensors: dict[str, torch.Tensor], directory: Path) -> None:
    """Copy `tensors` into `draft`, which must need exactly these; a stored copy of a tied head is allowed."""
    needed = dict(draft.named_parameters())
    missing, unknown = needed.keys() - tensors.keys(), tensors.keys() - draft.state_dict().keys()
    misshapen = [name for name in needed.keys() & tensors.keys() if needed[name].shape != tensors[name].shape]
    for fault, names in (("lacks", missing), ("does not know", unknown), ("has another shape for", misshapen)):
        if names:
            raise DraftError(f"the draft in {directory} does not fit its target: it {fault} {sorted(names)[0]}")
    with torch.no_grad():
        for name, parameter in needed.items():
            parameter.copy_(tensors[name])
