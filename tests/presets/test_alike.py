"""Models that look alike are told by what is said of them, and never in silence."""

from __future__ import annotations

from typing import Any

import pytest

from sfumato.presets import PRESETS, Kind, check_name, look_alikes
from sfumato.presets.alike import kind_of
from sfumato.presets.sd3 import SD35_LARGE
from sfumato.presets.xl import SDXL, SDXL_HYPER, SDXL_LCM, SDXL_LIGHTNING, SDXL_TURBO

XL_ALIKE = look_alikes(SDXL.pipeline, SDXL.denoiser, SDXL.scheduler)
LARGE_ALIKE = look_alikes(SD35_LARGE.pipeline, SD35_LARGE.denoiser, SD35_LARGE.scheduler)


def test_what_looks_alike() -> None:
    assert [p.name for p in XL_ALIKE] == ["sdxl", "sdxl-turbo", "sdxl-lightning", "sdxl-lcm", "sdxl-hyper"]
    assert [p.name for p in LARGE_ALIKE] == ["sd35-large", "sd35-large-turbo"]
    by_name = {p.name: p for p in PRESETS}
    for preset in PRESETS:
        if preset.like is not None:  # fewer steps without guidance, and nothing else
            base = by_name[preset.like]
            assert (preset.denoiser, preset.vae, preset.texts) == (base.denoiser, base.vae, base.texts), preset.name
            assert preset.num_inference_steps <= 8 < base.num_inference_steps and preset.guidance_scale == 1


@pytest.mark.parametrize(
    ("name", "expected", "steps"),
    [
        ("sd_xl_turbo_1.0_fp16", "sdxl-turbo", None),
        ("dreamshaperXL_v21TurboDPMSDE", "sdxl-turbo", None),
        ("TurboVisionXL", "sdxl-turbo", None),
        ("sdxl_lightning_4step_unet", "sdxl-lightning", 4),
        ("sdxl_lightning_8step", "sdxl-lightning", 8),
        ("juggernautXL_v9Rdphoto2Lightning", "sdxl-lightning", None),
        ("lcm-sdxl", "sdxl-lcm", None),
        ("Hyper-SDXL-8steps", "sdxl-hyper", 8),
        ("epicrealismXL_hyper2step", "sdxl-hyper", 2),
        ("sd_xl_base_1.0", None, None),
        ("hyperrealisticXL_v3", None, None),
        ("juggernautXL_v9", None, None),
        ("sdxl-200000-steps", None, None),
    ],
)
def test_names_say_which(name: str, expected: str | None, steps: int | None) -> None:
    found = kind_of(XL_ALIKE, {"the file's name": name})
    assert (found and found.name, found and found.steps) == (expected, steps)
    assert found is None or found.evidence == "the file's name"


def test_the_order_of_evidence() -> None:
    trailing = SDXL_LIGHTNING.scheduler
    names = {"the folder's name": "sdxl-turbo", "its index": "sdxl-lightning"}
    assert kind_of(XL_ALIKE, names, SDXL_LCM.scheduler, "sdxl", Kind("sdxl-hyper")) == Kind(
        "sdxl", None, "the word of --preset"
    )
    assert kind_of(XL_ALIKE, names, SDXL_LCM.scheduler, None, Kind("sdxl-hyper", 2)) == Kind("sdxl-hyper", 2)
    assert kind_of(XL_ALIKE, names, SDXL_LCM.scheduler) == Kind("sdxl-turbo", None, "the folder's name")
    assert kind_of(XL_ALIKE, {"x": "mine"}, SDXL_HYPER.scheduler) == Kind("sdxl-hyper", None, "its TCDScheduler")
    assert kind_of(XL_ALIKE, {}, SDXL_TURBO.scheduler) == Kind(
        "sdxl-turbo", None, "its EulerAncestralDiscreteScheduler"
    )
    # Euler's scheduler with trailing steps suits the base model as well: that is said, not guessed.
    assert kind_of(XL_ALIKE, {}, trailing) == Kind("sdxl", doubt="sdxl-lightning")
    assert kind_of(XL_ALIKE, {}, SDXL.scheduler) is None


def test_the_large_transformer() -> None:
    """The schedulers of the large model and its Turbo are one; the name "large" is enough to be silent."""
    for name, expected in (
        ("stable-diffusion-3.5-large-turbo", Kind("sd35-large-turbo", None, "x")),
        ("sd3.5_large_turbo-Q4_0", Kind("sd35-large-turbo", None, "x")),
        ("stable-diffusion-3.5-large", None),
        ("mine", Kind("sd35-large", doubt="sd35-large-turbo")),
    ):
        assert kind_of(LARGE_ALIKE, {"x": name}, SD35_LARGE.scheduler) == expected, name


@pytest.mark.parametrize(
    ("kind", "preset", "line"),
    [
        (
            Kind("sdxl-turbo", None, "the file's name"),
            SDXL_TURBO,
            "a.safetensors is taken for Stable Diffusion XL Turbo by the file's name, 1 step with guidance 1 unless "
            "told otherwise; if it is not, say --preset sdxl",
        ),
        (
            Kind("sdxl", doubt="sdxl-lightning"),
            SDXL,
            "a.safetensors is taken for Stable Diffusion XL, 25 steps with guidance 5 unless told otherwise; if it is "
            "sdxl-lightning, which looks the same, say --preset sdxl-lightning",
        ),
    ],
)
def test_a_guess_is_one_line(kind: Kind, preset: Any, line: str) -> None:
    assert kind.guessed and kind.line("a.safetensors", preset) == line


def test_wrong_names_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"preset 'sd15' is none of the models that this one looks like: sdxl, sdxl-turbo"
    ):
        kind_of(XL_ALIKE, {}, asked="sd15")
    with pytest.raises(ValueError, match=r"unknown preset 'sdxl-lightnin'; did you mean 'sdxl-lightning'\?"):
        check_name("sdxl-lightnin")
    with pytest.raises(ValueError, match="the preset that it notes is 3"):
        Kind.noted(3)
