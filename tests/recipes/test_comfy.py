from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.pipelines.request import parse
from sfumato.recipes import comfy


def graph(**changes: Any) -> dict[str, Any]:
    """ComfyUI's default graph with two adapters and clip skip; `changes` replace nodes."""
    nodes = {
        "3": node("KSampler", seed=8, steps=20, cfg=8, sampler_name="euler_ancestral", scheduler="karras", denoise=1)
        | {},
        "4": node("CheckpointLoaderSimple", ckpt_name="v1-5.ckpt"),
        "5": node("EmptyLatentImage", width=512, height=768, batch_size=1),
        "6": node("CLIPTextEncode", text="a fox embedding:smoke.pt", clip=["11", 0]),
        "7": node("CLIPTextEncode", text="text, watermark", clip=["11", 0]),
        "8": node("VAEDecode", samples=["3", 0], vae=["4", 2]),
        "9": node("SaveImage", images=["8", 0]),
        "10": node("LoraLoader", lora_name="a.safetensors", strength_model=0.5, strength_clip=0.5, model=["4", 0]),
        "11": node("CLIPSetLastLayer", stop_at_clip_layer=-2, clip=["10", 1]),
        "12": node("LoraLoaderModelOnly", lora_name="b.safetensors", strength_model=1.0, model=["10", 0]),
    }
    nodes["3"]["inputs"] |= {"model": ["12", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}
    return {name: entry for name, entry in {**nodes, **changes}.items() if entry is not None}


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


def test_the_usual_graph() -> None:
    fields, notes = comfy.read(json.dumps(graph()))
    request = parse(**fields)
    assert request.prompt == "a fox smoke.pt <lora:a:0.5> <lora:b:0:1>" and request.embeddings == ("smoke.pt",)
    assert (request.negative_prompt, request.prompt_rule, request.clip_skip) == ("text, watermark", "comfy", 1)
    assert (request.sampler, request.spacing, request.seed, request.num_inference_steps) == ("euler_a", "karras", 8, 20)
    assert (request.width, request.height, request.guidance_scale, request.model) == (512, 768, 8, "v1-5.ckpt")
    assert request.strength is None and notes == []


def test_image_to_image_and_values_from_nodes() -> None:
    nodes = graph(
        **{
            "5": node("VAEEncode", pixels=["20", 0], vae=["4", 2]),
            "20": node("LoadImage", image="in.png"),
            "6": node("CLIPTextEncode", text=["21", 0]),
            "21": node("PrimitiveString", value="a wolf"),
        }
    )
    nodes["3"]["inputs"] |= {"denoise": 0.5, "seed": ["22", 0]}
    nodes["22"] = node("Seed", seed=77)
    fields, notes = comfy.read(json.dumps(nodes))
    assert (fields["image"], fields["strength"], fields["num_inference_steps"]) == ("in.png", 0.5, 40)
    assert fields["seed"] == 77 and fields["prompt"].startswith("a wolf")
    assert any("in.png lay in ComfyUI's input folder" in note for note in notes)


def test_what_changes_both_texts_is_passed_through() -> None:
    nodes = graph(**{"40": node("ControlNetApplyAdvanced", negative=["7", 0], positive=["6", 0], strength=0.8)})
    nodes["3"]["inputs"] |= {"positive": ["40", 0], "negative": ["40", 1]}
    fields, notes = comfy.read(json.dumps(nodes))
    assert fields["prompt"].startswith("a fox") and fields["negative_prompt"] == "text, watermark"
    assert notes == [
        f"{n}: node 40 (ControlNetApplyAdvanced) was not taken over" for n in ("prompt", "negative_prompt")
    ]


def test_the_sampler_in_parts() -> None:
    nodes = graph(
        **{
            "3": node(
                "SamplerCustomAdvanced",
                noise=["30", 0],
                guider=["31", 0],
                sampler=["32", 0],
                sigmas=["33", 0],
                latent_image=["5", 0],
            ),
            "30": node("RandomNoise", noise_seed=5),
            "31": node("CFGGuider", cfg=3.5, model=["4", 0], positive=["6", 0], negative=["7", 0]),
            "32": node("KSamplerSelect", sampler_name="dpmpp_2m"),
            "33": node("BasicScheduler", scheduler="sgm_uniform", steps=12, denoise=1.0, model=["4", 0]),
        }
    )
    fields, notes = comfy.read(json.dumps(nodes))
    assert (fields["seed"], fields["guidance_scale"], fields["num_inference_steps"]) == (5, 3.5, 12)
    assert (fields["sampler"], fields["spacing"], fields["model"]) == ("dpmpp_2m", "sgm_uniform", "v1-5.ckpt")
    assert notes == []


def test_what_is_not_understood_is_said() -> None:
    nodes = graph(
        **{
            "12": node("FreeU", model=["10", 0]),
            "6": node("ConditioningCombine", conditioning_1=["7", 0], conditioning_2=["7", 0]),
            "5": node("LatentFromTheMoon"),
        }
    )
    nodes["3"]["inputs"] |= {"seed": 2**64 - 1, "sampler_name": "foo"}
    fields, notes = comfy.read(json.dumps(nodes))
    assert "seed" not in fields and "width" not in fields and "sampler" not in fields
    for said in ("node 12 (FreeU)", "seed = ", "unknown sampler 'foo'", "node 5 (LatentFromTheMoon)", "node 6 (Cond"):
        assert any(said in note for note in notes), (said, notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [("nothing", "not valid JSON"), ("[]", "is a list"), ("{}", "no sampler"), ('{"1": {"class_type": "X"}}', "X")],
)
def test_no_graph(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        comfy.read(text)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.text(max_size=5), st.lists(st.sampled_from(["3", "6", "12", 0]))
)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(st.sampled_from(list(graph())), st.one_of(VALUES, st.none()), max_size=3),
    st.dictionaries(st.sampled_from(["seed", "steps", "cfg", "model", "positive", "latent_image", "denoise"]), VALUES),
    st.sampled_from(["CLIPTextEncode", "KSampler", "LoraLoader", "VAEEncode"]),
)
def test_no_graph_breaks_the_reader(changes: dict[str, Any], inputs: dict[str, Any], kind: str) -> None:
    nodes = {**graph(), **changes, "12": {"class_type": kind, "inputs": {"model": ["12", 0], "text": ["12", 0]}}}
    if isinstance(nodes["3"], dict):
        nodes["3"] = {"class_type": "KSampler", "inputs": {**graph()["3"]["inputs"], **inputs}}
    try:
        comfy.read(json.dumps(nodes))
    except ValueError as error:
        assert "no sampler" in str(error)
