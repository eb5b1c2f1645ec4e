from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.pipelines.request import parse
from sfumato.recipes import infotext

# As A1111 1.6 writes it, with what makes reading hard: lines, a quoted value, a size, a second pass.
A1111 = """a (cat:1.2), "quoted", key: value
second line
Negative prompt: bad, worse
two lines
Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 123, Size: 512x768, Model hash: 6ce0161689, \
Model: v1-5-pruned-emaonly, Denoising strength: 0.6, Clip skip: 2, Hires upscale: 2, Hires upscaler: Latent, \
Lora hashes: "a: 1, b: 2", Version: v1.6.0"""


def test_a_text_of_a1111() -> None:
    text = infotext.read(A1111)
    assert text.prompt == 'a (cat:1.2), "quoted", key: value\nsecond line'
    assert text.negative_prompt == "bad, worse\ntwo lines"
    assert text.values["Lora hashes"] == "a: 1, b: 2" and text.values["Size-2"] == "768"
    fields, notes = infotext.fields(text)
    request = parse(**fields)
    assert (request.sampler, request.spacing, request.clip_skip, request.seed) == ("dpmpp_2m", "karras", 1, 123)
    assert (request.width, request.height, request.guidance_scale) == (512, 768, 7)
    assert (request.model, request.hires_scale, request.hires_strength) == ("v1-5-pruned-emaonly", 2, 0.6)
    assert request.strength is None and notes == []


@pytest.mark.parametrize(
    ("line", "sampler", "spacing"),
    [
        ("Sampler: Euler a", "euler_a", "linspace"),
        ("Sampler: DPM++ 2M, Version: v1.8.0", "dpmpp_2m", "linspace"),
        ("Sampler: DPM++ 2M, Version: v1.9.4", "dpmpp_2m", "karras"),
        ("Sampler: DPM++ 2M, Schedule type: SGM Uniform, Version: v1.10.1", "dpmpp_2m", "sgm_uniform"),
        ("Sampler: Euler a, Schedule type: Automatic, Version: v1.10.1", "euler_a", "linspace"),
        ("Sampler: DDIM", "ddim", None),
    ],
)
def test_samplers_and_what_their_names_left_out(line: str, sampler: str, spacing: str | None) -> None:
    fields, notes = infotext.fields(infotext.read(f"a cat\nSteps: 5, Seed: 1, {line}"))
    assert (fields["sampler"], fields.get("spacing"), notes) == (sampler, spacing, [])


def test_what_is_not_understood_is_said() -> None:
    text = "a cat\nSteps: many, Seed: -1, Sampler: Foo, Size: 3x9999, Tiling: True, Denoising strength: 0.4"
    fields, notes = infotext.fields(infotext.read(text))
    assert fields == {"prompt": "a cat", "negative_prompt": "", "strength": 0.4}
    for said in ("Steps: many", "Seed: -1", "unknown sampler 'Foo'", "Tiling: True", "made from an image"):
        assert any(said in note for note in notes), (said, notes)


def test_values_with_commas_that_are_not_quoted() -> None:
    line = 'Steps: 30, Seed: 5, Hashes: {"model": "238ffac319", "embed:a": "23f5"}, Hires upscale: 1.5'
    text = infotext.read(f"a cat\n{line}, Time taken: 18.0 sec.")
    assert list(text.values) == ["Steps", "Seed", "Hashes", "Hires upscale", "Time taken"]
    fields, notes = infotext.fields(text)
    assert (fields["hires_scale"], fields["seed"], notes) == (1.5, 5, [])


def test_a_last_line_with_few_pairs_is_prompt() -> None:
    text = infotext.read("a cat\nstyle: soft, mood: warm")
    assert (text.prompt, dict(text.values)) == ("a cat\nstyle: soft, mood: warm", {})


def test_order_and_quoting() -> None:
    request = parse(
        prompt="a cat",
        negative_prompt="blur",
        num_inference_steps=20,
        sampler="euler_a",
        spacing="sgm_uniform",
        guidance_scale=7,
        seed=3,
        width=512,
        height=640,
        model="/models/a, b.safetensors",
        clip_skip=1,
    )
    assert infotext.write(request, {"model_hash": "0123456789"}).split("\n") == [
        "a cat",
        "Negative prompt: blur",
        "Steps: 20, Sampler: Euler a, Schedule type: SGM Uniform, CFG scale: 7, Seed: 3, Size: 512x640, "
        'Model hash: 0123456789, Model: "a, b", Clip skip: 2, RNG: CPU, Version: sfumato 0.1.0',
    ]


WORDS = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=40).map(str.strip)


@settings(max_examples=60, deadline=None)
@given(
    prompt=WORDS.filter(bool),
    negative=WORDS,
    name=st.text('ab,:"\\ ', min_size=1).map(str.strip).filter(lambda n: n not in ("", "none")),
    seed=st.integers(0, 2**63 - 1),
    scale=st.integers(0, 400).map(lambda n: n / 4),
)
def test_what_is_written_is_read(prompt: str, negative: str, name: str, seed: int, scale: float) -> None:
    if prompt.startswith(infotext.NEGATIVE) or name.strip('"') != name:
        return
    request = parse(
        prompt=prompt,
        negative_prompt=negative,
        model=name,
        seed=seed,
        guidance_scale=scale,
        width=64,
        height=8,
        num_inference_steps=3,
        sampler="dpmpp_2m",
        spacing="karras",
    )
    fields, notes = infotext.fields(infotext.read(infotext.write(request)))
    assert parse(**fields) == request and notes == []


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200))
def test_no_text_breaks_the_reader(text: str) -> None:
    infotext.fields(infotext.read(text))
