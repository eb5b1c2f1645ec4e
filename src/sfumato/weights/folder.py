"""The model folder of the diffusers layout: `model_index.json` and a sub-folder for each part.

model_index.json
unet/              config.json, diffusion_pytorch_model.safetensors; called transformer/ in Stable Diffusion 3
vae/               likewise; called vqvae/ in models of the latent-diffusion kind
text_encoder/      config.json, model.safetensors; called bert/ in the latent-diffusion text-to-image model;
                   text_encoder_2/ likewise, in models with two, and text_encoder_3/, T5, in those with three
tokenizer/         vocab.json, merges.txt, tokenizer_config.json, special_tokens_map.json; tokenizer_2/ likewise;
                   tokenizer_3/ has T5's tokenizer.json or spiece.model
scheduler/         scheduler_config.json; low_res_scheduler/ likewise, for upscalers
depth_estimator/   as text_encoder/, for depth models; feature_extractor/preprocessor_config.json goes with it

Other sub-folders (safety_checker, image_encoder, the feature_extractor of other models...) are passed over. Weights
may also lie in variants (`model.fp16.safetensors`), in shards with an index, and in `.bin` files, which are read
safely.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from sfumato.diffusion.prediction import get_prediction
from sfumato.diffusion.scheduler import Scheduler
from sfumato.files import read_json, write_json
from sfumato.models.clip import CLIPTextConfig
from sfumato.models.depth import DepthEstimator, DPTProcessorConfig
from sfumato.models.dpt import DPTConfig
from sfumato.models.t5 import T5Config
from sfumato.presets import DenoiserConfig
from sfumato.text.towers import TextEncoder, Tokenizer
from sfumato.weights import compvis
from sfumato.weights.dpt import dpt_map
from sfumato.weights.keymap import KeyMap
from sfumato.weights.kinds import NOTED, folder_kind
from sfumato.weights.layouts import (
    ALIASES,
    DENOISERS,
    DEPTH,
    DEPTHS,
    LAYOUTS,
    LIBRARIES,
    LOW_RES,
    PLAIN,
    PROCESSOR,
    TEXTS,
    TOKENIZERS,
    VAES,
    WRITTEN,
    XL,
    ZEROS,
    Layout,
)
from sfumato.weights.parts import VAE, Components, Denoiser, HasComponents, network, towers_of
from sfumato.weights.safe import fill, write_tensors
from sfumato.weights.source import open_weights
from sfumato.weights.t5 import t5_map

INDEX = "model_index.json"
CONFIG = "config.json"
ADAPTER = "adapter_config.json"  # of an adapter in a folder of its own, as PEFT writes it
PROCESSOR_CONFIG = "preprocessor_config.json"
DIFFUSION_FILE = "diffusion_pytorch_model"
TRANSFORMERS_FILE = "model"
WEIGHTS = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model|pytorch_model)(?:\.(?P<variant>[\w-]+?))?"
    r"\.(?P<format>safetensors|bin)(?P<index>\.index(?:\.(?P<late>[\w-]+))?\.json)?"
)
SHARD = re.compile(r"-\d{5}-of-(\d{5})")
HALVES: Mapping[torch.dtype | None, str] = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def load_folder(
    path: Path | str,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    prediction: str | None = None,
    variant: str | None = None,
    without: Collection[str] = (),
    stored: Collection[str] = (),
    kind: str | None = None,
) -> Components:
    """Read a model folder, its networks converted to `dtype` and placed on `device`, one after the other.

    dtype:      None leaves every tensor as it is stored.
    prediction: overrides the scheduler's prediction_type.
    variant:    the files to prefer, such as "fp16" for `model.fp16.safetensors`; see `weights_file`.
    without:    sub-folders that are not read, of those that such models may lack.
    stored:     those whose tensors are left as they are stored, on the CPU.
    kind:       the name of its preset, where it looks like several.
    Raises FileNotFoundError when a part is missing, ValueError when it is of another kind or does not fit.
    """
    path = Path(path)
    index, family = read_index(path)
    layout = LAYOUTS[family]
    if variant is not None:
        _check_variant(path, layout, variant)

    def there(name: str) -> bool:
        """Whether a part is to be read: not one that such models may lack, and this one does."""
        if name in without and name in layout.optional:
            return False
        return name not in layout.optional or ((path / name).is_dir() and index.get(name) not in (None, [None, None]))

    def network(name: str, classes: Mapping[str, type]) -> nn.Module:
        default = layout.defaults if name == layout.vae else {}
        form = (None, "cpu") if name in stored else (dtype, device)
        return _network(path / name, class_of(path, index, name, classes), classes, *form, variant, default)

    def tokenizer(name: str) -> Tokenizer:
        return TOKENIZERS[class_of(path, index, name, TOKENIZERS)].from_folder(path / name)

    tokenizers = [tokenizer(name) if there(name) else None for name in layout.tokenizers]
    scheduler = _scheduler(path / "scheduler", prediction)
    low_res = _scheduler(path / LOW_RES, None) if layout.low_res else None
    denoiser = cast(Denoiser, network(layout.denoiser, DENOISERS))
    vae = cast(VAE, network(layout.vae, VAES))
    towers = [cast(TextEncoder, network(name, TEXTS)) if there(name) else None for name in layout.text_encoders]
    depth: DepthEstimator | None = None
    if DEPTH in layout.optional and there(DEPTH):
        depth = cast(DepthEstimator, network(DEPTH, DEPTHS))
        depth.processor = _processor(path / PROCESSOR / PROCESSOR_CONFIG)
    texts, readers = (*towers, None, None, None), (*tokenizers, None, None, None)
    family = _checked_family(path, family, denoiser.config, vae.config.latent_channels, texts[0] is not None)
    return Components(
        denoiser=denoiser,
        vae=vae,
        text_encoder=texts[0],
        tokenizer=readers[0],
        scheduler=scheduler,
        low_res_scheduler=low_res,
        pipeline=family,
        depth_estimator=depth,
        text_encoder_2=texts[1],
        tokenizer_2=readers[1],
        text_encoder_3=texts[2],
        tokenizer_3=readers[2],
        force_zeros_for_empty_prompt=layout is XL and bool(index.get(ZEROS, True)),
        kind=folder_kind(path, index, family, (layout.denoiser, denoiser.config), scheduler.config, kind),
    )


def load_vae_folder(
    path: Path | str,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    variant: str | None = None,
) -> VAE:
    """Read an autoencoder from its own folder, or from that of a whole model.

    Raises FileNotFoundError when there is none, ValueError when it is of another kind or does not fit.
    """
    path = Path(path)
    if (path / INDEX).is_file():
        index, family = read_index(path)
        folder, default = path / LAYOUTS[family].vae, LAYOUTS[family].defaults
        name = class_of(path, index, folder.name, VAES)
    elif (path / CONFIG).is_file():
        folder, default, name = path, {}, str(read_json(path / CONFIG).get("_class_name", "AutoencoderKL"))
        if name not in VAES:
            raise ValueError(f"{path} holds a {name!r}; an autoencoder is one of {', '.join(VAES)}")
    else:
        raise FileNotFoundError(f"{path} has neither {CONFIG} nor {INDEX}; give the folder of an autoencoder")
    return cast(VAE, _network(folder, name, VAES, dtype, device, variant, default))


def load_part(
    folder: Path | str,
    classes: Mapping[str, type],
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    variant: str | None = None,
) -> nn.Module:
    """Read one network from its own folder; classes: those that it may be, such as `UNETS` or `TEXTS`.

    Raises FileNotFoundError when there is none, ValueError when it is of another kind or does not fit.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}; give the folder of a network, or its subfolder's name")
    raw = read_json(folder / CONFIG)
    name = str(raw.get("_class_name") or next(iter(raw.get("architectures") or ()), None))
    if name not in classes:
        raise ValueError(f"{folder} holds a {name!r}; this is for {', '.join(classes)}")
    return _network(folder, name, classes, dtype, device, variant, {})


def save_folder(parts: HasComponents, path: Path | str, dtype: torch.dtype | None = None) -> None:
    """Write a model folder that this package and diffusers open; weights in `dtype` when given.

    Each file is replaced in one step, and `model_index.json` comes last: a folder without it is not complete.
    Raises ValueError when a part is missing that such models have.
    """
    path, layout, towers = Path(path), _layout(parts.pipeline), towers_of(parts)
    given: dict[str, Any] = {
        layout.denoiser: parts.denoiser,
        layout.vae: parts.vae,
        **dict(zip(layout.text_encoders, towers.encoders, strict=False)),
        **dict(zip(layout.tokenizers, towers.tokenizers, strict=False)),
        "scheduler": parts.scheduler,
        LOW_RES: parts.low_res_scheduler,
    }
    depth = parts.depth_estimator if DEPTH in layout.optional else None
    missing = [name for name in layout.folders if given[name] is None]
    if missing:
        raise ValueError(f"a {parts.pipeline} has {' and '.join(missing)}, which was not given; choose another class")
    rows: dict[str, Any] = {name: [None, None] for name in (*layout.absent, *layout.optional)}
    for name, part in given.items():
        if part is None or name not in layout.known:
            continue
        if name in layout.networks:
            file = TRANSFORMERS_FILE if name in layout.text_encoders else DIFFUSION_FILE
            class_name = _save_network(part, path / name, file, dtype)
        elif name in layout.tokenizers:
            part.save(path / name)
            class_name = next(name for kind, name in WRITTEN.items() if isinstance(part, kind))
        else:
            part.save_pretrained(path / name)
            class_name = type(part).__name__
        rows[name] = [LIBRARIES.get(class_name, "diffusers"), class_name]
    if depth is not None:
        rows |= _save_depth(depth, path, dtype)
    head = {"_class_name": parts.pipeline, "_diffusers_version": "0.30.0", **layout.entries, **_flags(parts, layout)}
    write_json(path / INDEX, head | dict(sorted(rows.items())))


def read_index(path: Path) -> tuple[dict[str, Any], str]:
    """The entries of a folder's `model_index.json` and the pipeline class that they stand for.

    Raises FileNotFoundError when it is no model folder, ValueError for a class that is not supported.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"no model folder {path}")
    if not (path / INDEX).is_file():
        raise FileNotFoundError(f"{path} is not a model folder: it has no {INDEX}")
    index = read_json(path / INDEX)
    name = index.get("_class_name")
    family = ALIASES.get(str(name), str(name))
    if family not in LAYOUTS:
        raise ValueError(f"{path / INDEX} describes a {name!r}; this version opens: {', '.join(sorted(LAYOUTS))}")
    return index, family


def class_of(path: Path, index: Mapping[str, Any], name: str, known: Mapping[str, Any]) -> str:
    """The class that the index names for a sub-folder; ValueError unless it is one of `known`."""
    row = index.get(name)
    found = row[1] if isinstance(row, list) and len(row) == 2 else None
    if found not in known:
        what = "names no class" if found is None else f"names the class {found!r}"
        raise ValueError(f"{path / INDEX} {what} for {name}; supported: {', '.join(known)}")
    return str(found)


def weights_file(folder: Path, variant: str | None = None, dtype: torch.dtype | None = None) -> Path:
    """The file of a network's weights, or the index of its shards, see `choose`.

    Raises FileNotFoundError naming what was looked for and what lies there instead.
    """
    present = sorted(p.name for p in folder.glob("*") if p.is_file()) if folder.is_dir() else []
    name = choose(present, variant, dtype)
    if name is None:
        files = ", ".join(f"{stem}.safetensors" for stem in (DIFFUSION_FILE, TRANSFORMERS_FILE))
        raise FileNotFoundError(f"{folder} has none of {files}; it holds: {', '.join(present) or 'nothing'}")
    return folder / name


def choose(names: Collection[str], variant: str | None = None, dtype: torch.dtype | None = None) -> str | None:
    """Of the files of one part, the name of the one to load; None when there is none.

    First the variant that is asked for, then the one stored in just the half precision that is wanted (half to read,
    and the same numbers), then the plain one, then any other. Of the same variant safetensors come before pickles
    and one file before shards.
    """
    found = {name: match for name in names if (match := WEIGHTS.fullmatch(name)) and not SHARD.search(name)}
    there = {name: match["variant"] or match["late"] for name, match in found.items()}
    wanted: list[str | None] = [variant] if variant is not None else []
    wanted += [HALVES[dtype]] if dtype in HALVES else []
    wanted += [None, *HALVES.values(), *sorted({v for v in there.values() if v is not None})]

    def rank(name: str) -> tuple[int, bool, bool, str]:
        match = found[name]
        return wanted.index(there[name]), match["format"] == "bin", match["index"] is not None, match["stem"]

    return min(found, key=rank, default=None)


def shards(index: str, names: Collection[str]) -> list[str]:
    """The files that belong to the index of shards `index`, by name; ValueError unless all are among `names`."""
    match = WEIGHTS.fullmatch(index)
    assert match is not None
    variant = match["variant"] or match["late"]
    mark = rf"(?:\.{re.escape(variant)})" if variant else ""
    either = rf"(?:{mark}{SHARD.pattern}|{SHARD.pattern}{mark})" if variant else SHARD.pattern
    pattern = re.compile(rf"{match['stem']}{either}\.{match['format']}")
    found = sorted(name for name in names if pattern.fullmatch(name))
    counted = {int(number) for name in found for number in SHARD.findall(name)}
    if counted != {len(found)}:
        raise ValueError(f"{index} belongs to {max(counted, default='some')} shards, of which {len(found)} are there")
    return found


def _network(
    folder: Path,
    name: str,
    classes: Mapping[str, type],
    dtype: torch.dtype | None,
    device: torch.device | str,
    variant: str | None,
    defaults: Mapping[str, Any],
) -> nn.Module:
    """One network of class `name`, in evaluation mode; its tensors are read and converted one by one."""
    parse = cast(Any, classes[name]).from_dict
    config = parse({**defaults, **read_json(folder / CONFIG), "_class_name": name})
    module = network(config)
    file = weights_file(folder, variant, dtype)
    with open_weights(file) as weights:
        table = _spelling(config, weights)
        placed = weights.to(dtype, device)
        tensors = dict(placed) if table is None else table.load(placed, str(file))
        fill(module, tensors, str(file), check=placed.converts)
    return module.eval()


def _save_network(network: Any, folder: Path, file: str, dtype: torch.dtype | None) -> str:
    """Write a network's weights and configuration; the name of its class."""
    config = network.config.to_dict()
    write_tensors(folder / f"{file}.safetensors", network.state_dict(), dtype)
    write_json(folder / CONFIG, config)
    return str(config["_class_name"])


def _save_depth(depth: DepthEstimator, path: Path, dtype: torch.dtype | None) -> dict[str, list[str]]:
    """Write an estimator of depth and how its pictures are prepared; their rows of the index."""
    name = _save_network(depth, path / DEPTH, TRANSFORMERS_FILE, dtype)
    processor = depth.processor.to_dict()
    write_json(path / PROCESSOR / PROCESSOR_CONFIG, processor)
    classes = {DEPTH: name, PROCESSOR: str(processor["image_processor_type"])}
    return {folder: [LIBRARIES[kind], kind] for folder, kind in classes.items()}


def _processor(file: Path) -> DPTProcessorConfig:
    """How pictures are prepared for the estimator of depth; as is usual where the folder does not say."""
    return DPTProcessorConfig.from_dict(read_json(file)) if file.is_file() else DPTProcessorConfig()


def _spelling(config: Any, names: Collection[str]) -> KeyMap | None:
    """The key map of a file that other versions of the libraries wrote; None where the names are ours."""
    if isinstance(config, CLIPTextConfig):
        whole = any(name.startswith("text_model.") for name in names)
        return compvis.clip_map(config) if whole else compvis.bare_clip_map(config)
    if isinstance(config, DPTConfig):
        return dpt_map(config)
    if isinstance(config, T5Config):
        return t5_map(config)
    old = any(name.endswith(".query.weight") for name in names)
    return compvis.old_attention_map(config) if old else None


def _scheduler(folder: Path, prediction: str | None) -> Scheduler:
    scheduler = Scheduler.from_pretrained(folder)
    if prediction is None:
        return scheduler
    wanted = get_prediction(prediction).name
    changed = Scheduler.from_config(scheduler.config, prediction_type=wanted)
    if changed.prediction != wanted:
        raise ValueError(f"{folder}: {type(scheduler).__name__} always predicts {changed.prediction!r}")
    return changed


def _layout(family: str) -> Layout:
    if family not in LAYOUTS:
        raise ValueError(f"models of class {family!r} are not supported; known: {', '.join(sorted(LAYOUTS))}")
    return LAYOUTS[family]


def _check_variant(path: Path, layout: Layout, variant: str) -> None:
    found: set[str] = set()
    for name in layout.networks:
        matches = (WEIGHTS.fullmatch(p.name) for p in (path / name).glob("*"))
        found |= {match["variant"] or match["late"] or "the plain one" for match in matches if match}
    if variant not in found:
        raise ValueError(f"no part of {path} has the variant {variant!r}; there are: {', '.join(sorted(found))}")


def _flags(parts: HasComponents, layout: Layout) -> dict[str, Any]:
    """What the index says of the model besides: which it is of those that look alike.

    Of Stable Diffusion XL also how empty prompts are read, and which numbers a refiner is told.
    """
    noted = None if parts.kind is None else parts.kind.to_dict()
    flags: dict[str, Any] = {} if noted is None else {NOTED: noted}
    if layout is not XL:
        return flags
    flags[ZEROS] = parts.force_zeros_for_empty_prompt
    if parts.pipeline != "StableDiffusionXLPipeline":
        flags["requires_aesthetics_score"] = parts.text_encoder is None
    return flags


def _checked_family(path: Path, family: str, config: DenoiserConfig, latent: int, first: bool) -> str:
    """The pipeline class by what the denoiser takes besides the noisy latent; ValueError when it is neither.

    A U-Net without further channels is a text-to-image model, though diffusers can inpaint with it. Only a refiner, a
    model without the first tower, is of the class that goes from image to image.
    """
    channels = config.in_channels
    extra: Mapping[str, Sequence[int]] = {
        "StableDiffusionInpaintPipeline": (latent + 1, 0),
        "StableDiffusionXLInpaintPipeline": (latent + 1, 0),
        "StableDiffusionInstructPix2PixPipeline": (latent,),
        "StableDiffusionDepth2ImgPipeline": (1,),
        "StableDiffusionUpscalePipeline": (3,),
    }
    allowed = [latent + more for more in extra.get(family, (0,))]
    if channels not in allowed:
        raise ValueError(
            f"{path}: the {LAYOUTS[family].denoiser} takes {channels} channels; that of a {family} takes {allowed[0]}"
        )
    return PLAIN.get(family, family) if channels == latent and first else family
