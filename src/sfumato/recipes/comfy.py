"""ComfyUI's graphs: the nodes that lead to a picture, read as the fields of a request as far as they go.

A graph is {id: {"class_type": ..., "inputs": {name: value or [id, output]}}}.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from sfumato.pipelines.request import MAX_SEED

OUTPUTS = ("SaveImage", "PreviewImage", "SaveImageWebsocket", "SaveAnimatedWEBP")
SAMPLERS = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")
EMPTY = ("EmptyLatentImage", "EmptySD3LatentImage")
LOADERS = {"CheckpointLoaderSimple": "ckpt_name", "CheckpointLoader": "ckpt_name", "UNETLoader": "unet_name"}
LORAS = ("LoraLoader", "LoraLoaderModelOnly")
EMBEDDING = re.compile(r"\bembedding:(?P<name>[\w./-]+)")
DEEPEST = 100  # nodes followed in a row; graphs are made by hand and may be circles


class Node:
    """A node with its inputs, links followed on demand."""

    def __init__(self, graph: Mapping[str, Any], name: str) -> None:
        entry = graph.get(name)
        entry = entry if isinstance(entry, dict) else {}
        self.graph = graph
        self.name = name
        self.kind = str(entry.get("class_type", "?"))
        inputs = entry.get("inputs")
        self.inputs: Mapping[str, Any] = inputs if isinstance(inputs, dict) else {}

    def __str__(self) -> str:
        return f"node {self.name} ({self.kind})"

    def link(self, name: str) -> Node | None:
        """The node that an input comes from; None where it is a value or not there."""
        value = self.inputs.get(name)
        if isinstance(value, list) and len(value) == 2 and str(value[0]) in self.graph:
            return Node(self.graph, str(value[0]))
        return None

    def links(self) -> list[Node]:
        """All nodes that inputs come from."""
        return [node for node in map(self.link, self.inputs) if node is not None]

    def value(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """An input that is a value, or stands in the one node that it comes from; None where it cannot be told."""
        value = self.inputs.get(name)
        if isinstance(value, kind) and not isinstance(value, bool | list):
            return value
        source = self.link(name)
        if source is None:
            return None
        plain = {key: v for key, v in source.inputs.items() if isinstance(v, kind) and not isinstance(v, bool | list)}
        for key in (name, "value", "text", "string", "seed"):
            if key in plain:
                return plain[key]
        return next(iter(plain.values())) if len(plain) == 1 else None


def read(text: str) -> tuple[dict[str, Any], list[str]]:
    """What a graph says in the fields of Request, and a line for each thing that was not understood.

    Raises ValueError for what is no graph, or has no sampler.
    """
    try:
        graph = json.loads(text)
    except ValueError as error:
        raise ValueError(f"the graph is not valid JSON: {error}") from None
    if not isinstance(graph, dict):
        raise ValueError(f"the graph is a {type(graph).__name__}; a JSON object of nodes is expected")
    found = _samplers(graph)
    if not found:
        kinds = ", ".join(sorted({Node(graph, name).kind for name in graph}))
        raise ValueError(f"the graph has no sampler that is known ({', '.join(SAMPLERS)}); its nodes: {kinds}")
    notes: list[str] = []
    sampler = found[0]
    if len(found) > 1:
        others = ", ".join(map(str, found[1:]))
        notes.append(f"the graph samples {len(found)} times; {sampler}, the last, is described, not {others}")
    fields: dict[str, Any] = {"prompt_rule": "comfy"}
    fields |= _numbers(sampler, notes)
    fields |= _texts(sampler, notes)
    fields |= _model(sampler, fields, notes)
    fields |= _size(sampler, fields, notes)
    for name in ("prompt", "negative_prompt"):
        words = [m["name"] for m in EMBEDDING.finditer(fields.get(name, ""))]
        if words:
            fields["embeddings"] = (*fields.get("embeddings", ()), *words)
            fields[name] = EMBEDDING.sub(lambda m: m["name"].split("/")[-1], fields[name])
    return {name: value for name, value in fields.items() if value is not None}, notes


def _samplers(graph: Mapping[str, Any]) -> list[Node]:
    """The samplers, the one nearest to a saved picture first."""
    nodes = [Node(graph, name) for name in graph]
    ends = [node for node in nodes if node.kind in OUTPUTS]
    near = [node for end in ends for node in _above(end) if node.kind in SAMPLERS]
    unique = {node.name: node for node in (*near, *(node for node in nodes if node.kind in SAMPLERS))}
    return list(unique.values())


def _above(node: Node) -> Iterator[Node]:
    """The nodes that one depends on, nearest first."""
    seen, wave = {node.name}, [node]
    while wave:
        wave = [above for one in wave for above in one.links() if above.name not in seen]
        wave = list({above.name: above for above in wave}.values())
        seen |= {above.name for above in wave}
        yield from wave


def _numbers(sampler: Node, notes: list[str]) -> dict[str, Any]:
    """Seed, steps, scale, sampler and spacing."""
    from sfumato.diffusion.names import find_sampler, find_spacing

    # Newer nodes keep some of them in nodes of their own.
    places = {"noise": sampler, "guider": sampler, "sampler": sampler, "sigmas": sampler}
    places |= {name: node for name in places if (node := sampler.link(name)) is not None}
    seeds = [places["noise"].value(name, int) for name in ("seed", "noise_seed")]
    fields: dict[str, Any] = {
        "seed": next((seed for seed in seeds if seed is not None), None),
        "num_inference_steps": places["sigmas"].value("steps", int),
        "guidance_scale": places["guider"].value("cfg", (int, float)),
    }
    if fields["guidance_scale"] is None and places["guider"].kind == "BasicGuider":
        fields["guidance_scale"] = 1.0
    if fields["seed"] is not None and not 0 <= fields["seed"] <= MAX_SEED:
        notes.append(f"seed = {fields['seed']} is outside of 0 to {MAX_SEED}; another will be drawn")
        fields["seed"] = None
    named = places["sampler"].value("sampler_name", str)
    schedule = places["sigmas"].value("scheduler", str)
    try:
        fields["sampler"], fields["spacing"] = find_sampler(named) if named else (None, None)
        fields["spacing"] = find_spacing(schedule) if schedule else fields["spacing"]
    except ValueError as error:
        notes.append(str(error))
    denoise = places["sigmas"].value("denoise", (int, float))
    if denoise is not None and 0 < denoise < 1 and fields["num_inference_steps"]:
        # `steps` are all walked there, of a way that is as much longer.
        fields["strength"] = float(denoise)
        fields["num_inference_steps"] = max(1, round(fields["num_inference_steps"] / denoise))
    for name in ("start_at_step", "end_at_step"):
        at = sampler.value(name, int)
        if at is not None and not (at == 0 if name == "start_at_step" else at >= (fields["num_inference_steps"] or 0)):
            notes.append(f"{name} = {at} of {sampler} was not taken over")
    for name in ("seed", "num_inference_steps"):
        if fields[name] is None and not any("another will be drawn" in note for note in notes):
            notes.append(f"{name} could not be found at {sampler}")
    return fields


def _texts(sampler: Node, notes: list[str]) -> dict[str, Any]:
    guider = sampler.link("guider") or sampler
    texts: dict[str, Any] = {}
    for field, names in (("prompt", ("positive", "conditioning")), ("negative_prompt", ("negative",))):
        node = next((n for n in map(guider.link, names) if n is not None), None)
        if node is not None:
            texts[field] = _text(node, field, notes)
    return texts


def _text(node: Node, field: str, notes: list[str]) -> str:
    """The text of the first encoder that a condition comes from."""
    for _ in range(DEEPEST):
        if node.kind == "ConditioningZeroOut":
            return ""
        for name in ("text", "text_g", "text_l", "prompt"):
            text = node.value(name, str)
            if text is not None:
                return str(text)
        # What works on both texts at once calls them by their side.
        names = [field.removesuffix("_prompt").replace("prompt", "positive"), *node.inputs]
        names = [name for name in names if name.startswith(("conditioning", "positive", "negative"))]
        above = [n for name in names if (n := node.link(name)) is not None]
        if not above:
            break
        notes.append(f"{field}: {node} was not taken over")
        node = above[0]
    notes.append(f"{field} could not be found: {node} was not understood")
    return ""


def _model(sampler: Node, fields: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The checkpoint, the adapters on the way to it, clip skip."""
    guider = sampler.link("guider") or sampler
    node, tags, model = guider.link("model"), [], None
    for _ in range(DEEPEST):
        if node is None:
            notes.append("the model could not be found; give it (--model)")
            break
        if node.kind in LOADERS:
            model = node.value(LOADERS[node.kind], str)
            break
        if node.kind in LORAS:
            name = str(node.value("lora_name", str)).replace("\\", "/").removesuffix(".safetensors")
            unet = node.value("strength_model", (int, float)) or 0
            text = node.value("strength_clip", (int, float)) if node.kind == "LoraLoader" else 0
            tags.append(f"<lora:{name}:{unet:g}>" if text == unet else f"<lora:{name}:{text or 0:g}:{unet:g}>")
        else:
            notes.append(f"{node} changes the model and was not taken over")
        node = node.link("model")
    found: dict[str, Any] = {"model": model}
    if tags:
        found["prompt"] = " ".join([fields.get("prompt", ""), *reversed(tags)]).strip()
    for above in _above(guider):
        stop = above.value("stop_at_clip_layer", int) if above.kind == "CLIPSetLastLayer" else None
        if stop is not None and stop < -1:
            found["clip_skip"] = -stop - 1
    decoders = [n for name in sampler.graph if (n := Node(sampler.graph, name)).kind.startswith("VAEDecode")]
    vaes = [vae for n in decoders if (vae := n.link("vae")) is not None and vae.kind == "VAELoader"]
    if vaes:
        found["vae"] = vaes[0].value("vae_name", str)
    return found


def _size(sampler: Node, fields: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The size of an empty latent, or the picture that one was encoded from."""
    node = sampler.link("latent_image")
    found: dict[str, Any] = {}
    for _ in range(DEEPEST):
        if node is None:
            break
        if node.kind in EMPTY:
            count = node.value("batch_size", int) or 1
            if count > 1:
                notes.append(f"one of {count} pictures of a batch, which share one generator of noise there")
            return found | {"width": node.value("width", int), "height": node.value("height", int)}
        if node.kind.startswith("VAEEncode"):
            found["strength"] = fields.get("strength", 1.0)
            for name, links in (("image", ("pixels",)), ("mask", ("mask",))):
                source = next((n for n in map(node.link, links) if n is not None), None)
                if source is not None and source.kind.startswith("LoadImage"):
                    found[name] = source.value("image", str)
                    notes.append(f"{name}: {found[name]} lay in ComfyUI's input folder; give it again (--{name})")
                elif source is not None:
                    notes.append(f"{name}: {source} was not understood; give it (--{name})")
            return found
        notes.append(f"{node} was not taken over")
        node = node.link("samples") or node.link("latent")
    notes.append("the size could not be found; give --width and --height")
    return found
