"""A draft on disk: only what it does not share with its target, and how to put the two together again.

A draft directory holds `draft.safetensors` (the new tensors, in bfloat16 or, packed, in 8 bits: see
`cloud_verifier.registry.int8`) and `draft.json` (the layout, and the identity of the target tensors that it was
trained with). The target's configuration and shared tensors come from the target.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

try:
    from transformers.modeling_utils import no_init_weights
except ImportError:  # where release 5 has it
    from transformers.initialization import no_init_weights

from cloud_verifier.draft_models.layouts import DraftPlan, describe_shared, draft_config, freeze_shared
from cloud_verifier.draft_models.safetensors_io import read_tensors, tensor_files
from cloud_verifier.registry.int8 import pack, unpack
from edge_runtime.protocol.errors import DraftError, InputError

FORMAT_VERSION = 1
WEIGHTS = "draft.safetensors"
DESCRIPTION = "draft.json"


@dataclass(frozen=True)
class DraftDescription:
    """What `draft.json` says.

    Attributes:
        format_version: of this file.
        model_type: architecture of target and draft.
        plan: which blocks are new and which the target's.
        shared_identity: identity of the shared tensors, the one that a client presents to the verifier.
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
    """Writes the draft's own tensors and their description; `target_directory` is what it was trained for.

    Args:
        packed: matrices in 8 bits: half the file, for drafts that will be stored in no more bits anyway.

    Raises:
        DraftError: a shared tensor of `draft` is no longer the target's.
    """
    shared = read_shared(target_directory, plan)
    parameters = dict(draft.named_parameters())
    for name, tensor in shared.items():
        if name in parameters and not torch.equal(parameters[name].detach().float().cpu(), tensor.float()):
            raise DraftError(f"{name} is shared with {target_directory} and was changed: freeze it and train again")
    own = {name: parameter.detach().cpu() for name, parameter in parameters.items() if name not in shared}
    stored = pack(own) if packed else {name: tensor.to(torch.bfloat16) for name, tensor in own.items()}
    description = DraftDescription(
        FORMAT_VERSION, draft.config.model_type, plan, _identity(shared, plan), tuple(sorted(own))
    )
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, directory / WEIGHTS, {"format": "pt"})
    text = json.dumps(asdict(description), indent=2) + "\n"
    (directory / DESCRIPTION).write_text(text, encoding="utf-8")


def load_draft(directory: Path, target_directory: Path) -> PreTrainedModel:
    """The whole draft in float32 on the CPU, its shared parameters frozen.

    Raises:
        DraftError: the directory holds no whole draft, or it was made for a target with other shared tensors.
        TargetError: the target's checkpoint cannot be read.
    """
    description = read_description(directory)
    plan = description.plan
    config = AutoConfig.from_pretrained(target_directory)
    if (config.model_type, config.num_hidden_layers) != (description.model_type, plan.target_blocks):
        raise DraftError(
            f"{directory} is a draft for a {description.model_type} of {plan.target_blocks} blocks, and "
            f"{target_directory} is a {config.model_type} of {config.num_hidden_layers}: name the right target"
        )
    shared = read_shared(target_directory, plan)
    identity = _identity(shared, plan)
    if identity != description.shared_identity:
        raise DraftError(
            f"{directory} was trained with shared tensors {description.shared_identity} and {target_directory} has "
            f"{identity}: name the target that it was made for, or train a draft for this one"
        )
    try:
        own = unpack(load_file(directory / WEIGHTS))
    except (OSError, SafetensorError) as error:
        raise DraftError(f"{directory / WEIGHTS} cannot be read ({error}): copy the draft again") from None
    # Every parameter is about to be filled: random ones for billions of weights would take longer than all the rest.
    with no_init_weights():
        draft = AutoModelForCausalLM.from_config(draft_config(config, plan), dtype=torch.float32)
    draft.tie_weights()
    _fill(draft, shared | own, directory)
    freeze_shared(draft, plan)
    return draft.eval()


def read_description(directory: Path) -> DraftDescription:
    """Reads `draft.json`.

    Raises:
        DraftError: there is none, or it is not one that this release reads.
    """
    path = directory / DESCRIPTION
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
        raise DraftError(f"no draft in {directory}: it has no {DESCRIPTION}") from None
    except (ValueError, KeyError, TypeError, InputError) as error:
        raise DraftError(f"{path} does not describe a draft ({error}): copy the draft again") from None


def read_shared(target_directory: Path, plan: DraftPlan) -> dict[str, torch.Tensor]:
    """The target's tensors that the draft shares, by their names in the draft, as the target stores them."""
    names = plan.shared_tensors(tensor_files(target_directory))
    tensors = read_tensors(target_directory, names.values())
    return {draft_name: tensors[target_name] for draft_name, target_name in names.items()}


def _identity(shared: dict[str, torch.Tensor], plan: DraftPlan) -> str:
    """Identity of the shared tensors, which is over their names in the target."""
    return describe_shared({plan.origin_of(name): tensor for name, tensor in shared.items()}, plan).identity


def _fill(draft: PreTrainedModel, tensors: dict[str, torch.Tensor], directory: Path) -> None:
    """Loads `tensors` into `draft`, which must need exactly these; a stored copy of a tied head is allowed."""
    needed = dict(draft.named_parameters())
    missing, unknown = needed.keys() - tensors.keys(), tensors.keys() - draft.state_dict().keys()
    misshapen = [name for name in needed.keys() & tensors.keys() if needed[name].shape != tensors[name].shape]
    for fault, names in (
        ("lacks", missing),
        ("does not know", unknown),
        ("has another shape for", misshapen),
    ):
        if names:
            raise DraftError(f"the draft in {directory} does not fit its target: it {fault} {sorted(names)[0]}")
    with torch.no_grad():
        for name, parameter in needed.items():
            parameter.copy_(tensors[name])
