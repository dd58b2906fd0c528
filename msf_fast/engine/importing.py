"""Published checkpoints as runs of this project."""

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from msf_fast.config import RunConfig
from msf_fast.engine import configuration
from msf_fast.engine.configuration import make_config
from msf_fast.engine.pipeline import BuiltStage, build_stages, frozen_in, stage_checkpoints
from msf_fast.engine.run import CONFIG, find_folder
from msf_fast.errors import CheckpointError
from msf_fast.published import Layout, find_layout, from_published, to_published
from msf_fast.weights import checkpoint_follows


def read_published(path: Path) -> tuple[dict[str, Tensor], Layout]:
    """A published checkpoint's tensors under their own names, and which kind it is. Nothing in the file is run.

    Raises:
        CheckpointError: missing, damaged, no plain dictionary of tensors, or none of the published kinds.
    """
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: not a plain dictionary of tensors ({_reason(error)})") from error
    except Exception as error:
        raise CheckpointError(f"{path}: damaged, or not written by torch.save ({_reason(error)})") from error
    if not isinstance(tensors, dict) or not all(isinstance(one, Tensor) for one in tensors.values()):
        raise CheckpointError(f"{path}: not a plain dictionary of tensors, but a {type(tensors).__name__}")
    try:
        return tensors, find_layout(map(str, tensors))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _reason(error: Exception) -> str:
    """The line of torch's message that names what it found."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    found = next((line for line in lines if "Unsupported" in line or "GLOBAL" in line), lines[0])
    return found.removeprefix("WeightsUnpickler error: ")[:160]


def import_run(
    path: Path, folder: Path, autoencoder: Path | None, data: str, data_dir: Path | None = None
) -> RunConfig:
    """Make a run in ``folder`` of a published checkpoint.

    Args:
        path: the checkpoint.
        folder: of the run; it must hold none yet.
        autoencoder: the published checkpoint of the autoencoder of a second stage.
        data, data_dir: the run's data, as in ``RunConfig``.

    Returns:
        The run's configuration.

    Raises:
        CheckpointError: a file that is none of the published ones, or not of the same training; says what was found.
        ConfigError: the folder holds a run already.
    """
    find_folder("import", folder, False)
    tensors, layout = read_published(path)
    first = None
    if autoencoder is not None:
        first, kind = read_published(autoencoder)
        if layout.stage == "autoencoder" or kind.stage != "autoencoder":
            raise CheckpointError(
                f"{autoencoder}: expected the autoencoder of {path}, but these are {kind.stage} and {layout.stage}"
            )
        _check_same_autoencoder(tensors, first, path, autoencoder)
    config = _make_config(tensors, layout, first is not None, path)
    config.data, config.data_dir = data, data_dir
    with checkpoint_follows():
        built = build_stages(config)
    if first is not None:
        _load(built["autoencoder"], first, kind, autoencoder)
    _load(built[layout.stage], tensors, layout, path)
    folder.mkdir(parents=True, exist_ok=True)
    for name, (stage, model, _) in built.items():
        checkpoints, frozen = stage_checkpoints(config, folder, name), frozen_in(built, name)
        checkpoints.save(stage.steps, model, {"imported": str(path)}, frozen)
    configuration.save(config, folder / CONFIG)
    return config


def _check_same_autoencoder(
    tensors: Mapping[str, Tensor], first: Mapping[str, Tensor], path: Path, autoencoder: Path
) -> None:
    for name, tensor in tensors.items():
        alone = f"m.{name.removeprefix('m.mediat.')}"
        if name.startswith("m.mediat.") and not (alone in first and torch.equal(tensor, first[alone])):
            raise CheckpointError(f"{autoencoder}: not the autoencoder of {path}: tensor {alone} is another one")


def _make_config(tensors: Mapping[str, Tensor], layout: Layout, image_decoder: bool, path: Path) -> RunConfig:
    """The release preset with the sizes of these tensors."""
    config = make_config(layout.method, "release")
    vae = config.settings.vae
    part = "m." if layout.stage == "autoencoder" else "m.mediat."
    try:
        vae.channels = len(tensors[f"{part}encode.3.bias"])
        vae.shared_codes, *codes = (len(tensors[f"{part}quant.{book}.codebook.weight"]) for book in range(4))
        if layout.stage != "autoencoder":
            config.settings.encoder.slots = tensors["m.initializ.mean"].shape[-2]
            config.settings.encoder.pretrained_backbone = False  # its weights are in the file
            vae.image_decoder = image_decoder
            config.settings.autoencoder = None
    except KeyError as error:
        raise CheckpointError(f"{path}: tensor {error.args[0]} is missing") from None
    vae.scale_codes, vae.pretrained_taesd, vae.perceptual = tuple(codes), False, 0.0
    return config


def _load(built: BuiltStage, tensors: Mapping[str, Tensor], layout: Layout, path: Path) -> None:
    """Load all of the tensors, which must be those that the model has a published name for."""
    try:
        found = from_published(tensors, layout)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    state = built.model.state_dict()
    expected = from_published(to_published(state, layout), layout)
    if layout.stage != "autoencoder":
        expected = {name: one for name, one in expected.items() if ".autoencoder.decoder." not in name}
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            missing = len(expected.keys() - found.keys())
            raise CheckpointError(
                f"{path}: {missing} tensors are missing, such as {_their_name(name, expected, layout)}"
            )
        if name not in expected:
            raise CheckpointError(
                f"{path}: {len(found.keys() - expected.keys())} tensors too many, such as {_their_name(name, found, layout)}"
            )
        if found[name].shape != expected[name].shape:
            raise CheckpointError(
                f"{path}: tensor {_their_name(name, found, layout)} is {tuple(found[name].shape)}; expected {tuple(expected[name].shape)}"
            )
    built.model.load_state_dict(found, strict=False)


def _their_name(name: str, tensors: Mapping[str, Tensor], layout: Layout) -> str:
    return next(iter(to_published({name: tensors[name]}, layout)))
