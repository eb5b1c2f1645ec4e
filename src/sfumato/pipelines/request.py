"""`Request`: the one description of a picture.

The command line's flags, the arguments of `pipe(...)` and the recipe inside each PNG are all read off its
fields, so a new option is one new field here. Importing this module does not import torch.
"""

from __future__ import annotations

import difflib
import random
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from sfumato.pipelines.fields import (
    CHOICES,
    MAX_LETTERS,
    MAX_NOISE_LEVEL,
    MAX_SEED,
    MAX_SIDE,
    MAX_WORDS,
    BlockCache,
    DeepCache,
    Flag,
    Given,
    KnownAPG,
    KnownThreshold,
    Listed,
    Numbers,
    Picture,
    RisingShares,
    Told,
    WholeNumbers,
    typed,
)
from sfumato.pipelines.matrix import prompts_of

if TYPE_CHECKING:
    from sfumato.presets import Preset

HEIGHT_WIDTH, TOP_LEFT = Flag(value="HEIGHT,WIDTH"), Flag(value="TOP,LEFT")
AS_FOR_PROMPT = Field(description="The same for the negative prompt (default: as for the prompt).")


class Request(BaseModel):
    """One wish for pictures; None stands for "as the model prefers" until `resolved` fills it in.

    Which fields a model can use is the pipeline's to say. Pictures are paths or PIL images; in JSON a PIL image
    becomes a description that cannot be opened, so that replaying asks for it.
    Raises ValueError (pydantic's) that names the field, the value and what is allowed; see `parse`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    prompt: Annotated[str, Field(description="What the picture shows; a number for a model of classes.")] = ""
    negative_prompt: Annotated[str, Field(description="What guidance leads away from."), Flag(("--negative",))] = ""
    image: Annotated[
        Picture | None,
        Given,
        Field(description="Picture to start from, to change, to repaint or to enlarge."),
        Flag(("-i",), "FILE"),
    ] = None
    mask: Annotated[
        Picture | None,
        Given,
        Field(description="Where to repaint: white is repainted, black is kept."),
        Flag(value="FILE"),
    ] = None
    depth: Annotated[
        Picture | None, Given, Field(description="Depth map of the image: near is bright."), Flag(value="FILE")
    ] = None
    strength: Annotated[
        float | None,
        Field(ge=0, le=1, description="How far to leave the image, 1 is all the way (default: by the model)."),
    ] = None
    soft_mask: Annotated[
        bool | None,
        Field(description="Take the mask's grey levels for how far each pixel is repainted (default: black or white)."),
    ] = None
    mask_blur: Annotated[
        float | None,
        Field(ge=0, le=64, description="Pixels over which what was repainted fades out around the mask (default: 4)."),
    ] = None
    masked_content: Annotated[
        str | None,
        Field(description="What is under the mask at first: original, fill, noise or nothing (default: original)."),
    ] = None
    only_masked: Annotated[
        bool | None,
        Field(description="Cut the masked part out, repaint it at the model's size and put it back (default: no)."),
    ] = None
    mask_padding: Annotated[
        int | None,
        Field(ge=0, le=1024, description="Pixels around the mask that are cut out with it (default: 32)."),
    ] = None
    outpaint: Annotated[
        tuple[int, ...] | None,
        WholeNumbers,
        Field(description="Pixels by which the picture grows at the left, right, top and bottom; one number for all."),
        Flag(value="L,R,T,B"),
    ] = None
    paste: Annotated[
        bool | None,
        Field(
            description="Give back exactly what was not masked, not what the autoencoder makes of it (default: yes)."
        ),
    ] = None
    image_guidance_scale: Annotated[
        float | None,
        Field(ge=0, le=100, description="Weight of the image where a model follows instructions (default: 1.5)."),
        Flag(("--image-cfg",)),
    ] = None
    noise_level: Annotated[
        int | None,
        Field(ge=0, le=MAX_NOISE_LEVEL, description="Noise that an upscaler adds to the small image (default: 20)."),
    ] = None
    width: Annotated[
        int | None, Field(ge=8, le=MAX_SIDE, description="Width in pixels (default: the image's or the model's).")
    ] = None
    height: Annotated[
        int | None, Field(ge=8, le=MAX_SIDE, description="Height in pixels (default: the image's or the model's).")
    ] = None
    num_inference_steps: Annotated[
        int | None,
        Field(ge=1, le=1000, description="Denoising steps: more is slower and finer (default: the model's)."),
        Flag(("--steps",)),
    ] = None
    guidance_scale: Annotated[
        float | None,
        Field(ge=0, le=100, description="Weight of the prompt; 1 is no guidance (default: the model's)."),
        Flag(("--cfg",)),
    ] = None
    guidance_rescale: Annotated[
        float | None,
        Field(ge=0, le=1, description="Share by which guidance is brought back to the contrast without (default: 0)."),
    ] = None
    guidance_interval: Annotated[
        tuple[float, ...] | None,
        Numbers,
        RisingShares,
        Field(description="Guide between these shares of the steps only, e.g. 0.1,0.8 (default: everywhere)."),
        Flag(value="FROM,TO"),
    ] = None
    cfg_pp: Annotated[
        float | None,
        Field(
            ge=0, le=10, description="Weight of CFG++, about 0.2 to 1, in the place of guidance_scale (default: off)."
        ),
    ] = None
    apg: Annotated[
        tuple[float, ...] | None,
        Numbers,
        KnownAPG,
        Field(
            description="Projected guidance: share kept of what saturates, then the largest norm of an update, then "
            "momentum, e.g. 0,7.5,-0.75 (default: off)."
        ),
        Flag(value="SHARE[,NORM[,MOMENTUM]]"),
    ] = None
    pag_scale: Annotated[
        float | None,
        Field(ge=0, le=100, description="Weight of perturbed-attention guidance, e.g. 3 (default: 0, which is off)."),
        Flag(("--pag",)),
    ] = None
    pag_layers: Annotated[
        tuple[str, ...],
        Listed,
        Field(min_length=1, description="Layers that it perturbs, by parts of their names (default: mid)."),
        Flag(value="NAME,..."),
    ] = ("mid",)
    slg_scale: Annotated[
        float | None,
        Field(ge=0, le=100, description="Weight of skip-layer guidance, e.g. 2.8 (default: 0, which is off)."),
        Flag(("--slg",)),
    ] = None
    slg_layers: Annotated[
        tuple[int, ...],
        Listed,
        Field(min_length=1, description="Blocks of a transformer that it skips, from 0 (default: 7,8,9)."),
        Flag(value="NUMBER,..."),
    ] = (7, 8, 9)
    slg_interval: Annotated[
        tuple[float, ...],
        Numbers,
        RisingShares,
        Field(description="Shares of the steps between which it acts (default: 0.01,0.2)."),
        Flag(value="FROM,TO"),
    ] = (0.01, 0.2)
    dynamic_threshold: Annotated[
        tuple[float, ...] | None,
        Numbers,
        KnownThreshold,
        Field(
            description="Quantile, e.g. 0.995, to which bright clean pictures are clipped and shrunk; for latents also "
            "their range, e.g. 0.995,4 (default: off)."
        ),
        Flag(value="QUANTILE[,RANGE]"),
    ] = None
    deep_cache: DeepCache = None
    block_cache: BlockCache = None
    int8: Annotated[
        bool,
        Field(description="Multiply a transformer's weights in 8 bits on a CPU; changes the picture (default: no)."),
    ] = False
    fast: Annotated[
        bool,
        Field(description="Save time where it changes the picture little, see docs/speed.md (default: no)."),
    ] = False
    rescale_betas_zero_snr: Annotated[
        bool | None,
        Field(description="Let the noise levels begin at pure noise, for v-predicting models (default: the model's)."),
        Flag(("--zero-snr",)),
    ] = None
    seed: Annotated[
        int | None,
        Field(
            ge=0,
            le=MAX_SEED,
            description="Seed of the first picture; the next is one more (default: random).",
        ),
    ] = None
    variation_seed: Annotated[
        int | None,
        Field(ge=0, le=MAX_SEED, description="Seed of the noise that varies the first picture (default: random)."),
    ] = None
    variation_strength: Annotated[
        float | None,
        Field(ge=0, le=1, description="How far to go from the noise of seed to that of variation_seed (default: 0)."),
    ] = None
    sampler: Annotated[str | None, Field(description="Sampler, see `sfumato samplers` (default: the model's).")] = None
    spacing: Annotated[
        str | None, Field(description="How steps are spread over the noise levels (default: the model's).")
    ] = None
    eta: Annotated[
        float | None,
        Field(ge=0, le=1, description="Share of fresh noise a step, for samplers that take it (ddim)."),
    ] = None
    hires_scale: Annotated[
        float | None,
        Field(gt=1, le=8, description="Enlarge the picture so many times, and let the model go over it (default: no)."),
    ] = None
    hires_strength: Annotated[
        float | None,
        Field(ge=0, le=1, description="How far to leave the enlarged picture (default: 0.7 for latent, else 0.4)."),
    ] = None
    hires_upscaler: Annotated[
        str | None, Field(description="How it is enlarged: latent, or lanczos for its pixels (default: lanczos).")
    ] = None
    tile: Annotated[
        int | None,
        Field(ge=8, le=MAX_SIDE, description="Side of the windows in which large pictures are made (default: whole)."),
    ] = None
    original_size: Annotated[
        Told, Field(description="Size that an SDXL model is told the picture had (default: its own)."), HEIGHT_WIDTH
    ] = None
    crops_coords_top_left: Annotated[
        Told, Field(description="What it is told was cut off above and at the left (default: 0,0)."), TOP_LEFT
    ] = None
    target_size: Annotated[
        Told, Field(description="Size that it is told the picture is to have (default: its own)."), HEIGHT_WIDTH
    ] = None
    negative_original_size: Annotated[Told, AS_FOR_PROMPT, HEIGHT_WIDTH] = None
    negative_crops_coords_top_left: Annotated[Told, AS_FOR_PROMPT, TOP_LEFT] = None
    negative_target_size: Annotated[Told, AS_FOR_PROMPT, HEIGHT_WIDTH] = None
    aesthetic_score: Annotated[
        float | None, Field(ge=0, le=10, description="Beauty that a refiner is told of the picture (default: 6).")
    ] = None
    negative_aesthetic_score: Annotated[
        float | None, Field(ge=0, le=10, description="The same for the negative prompt (default: 2.5).")
    ] = None
    refiner: Annotated[
        str | None, Field(min_length=1, description="Model that makes the last steps."), Flag(value="MODEL")
    ] = None
    refiner_start: Annotated[
        float | None, Field(gt=0, lt=1, description="Share of the noise levels after which it does (default: 0.8).")
    ] = None
    prompt_matrix: Annotated[
        bool, Field(description="Make a picture of each choice among the parts of a prompt, a|b|c (default: no).")
    ] = False
    prompt_rule: Annotated[
        str | None, Field(description="How (word:1.2) is weighted: a1111, comfy, or none (default: a1111).")
    ] = None
    clip_skip: Annotated[
        int | None, Field(ge=0, le=100, description="Layers of the text tower left out at the end (default: 0).")
    ] = None
    embeddings: Annotated[
        tuple[str, ...],
        Listed,
        Field(description="Textual inversions: files or names, parted by commas."),
        Flag(value="FILE,..."),
    ] = ()
    num_images: Annotated[
        int, Field(ge=1, le=1000, description="How many pictures, with seeds one apart (default: 1)."), Flag(("-n",))
    ] = 1
    model: Annotated[
        str,
        Field(min_length=1, description="Built-in model's name, file, folder or hub id (default: mini)."),
        Flag(("-m",), "MODEL"),
    ] = "mini"
    vae: Annotated[
        str | None,
        Field(min_length=1, description="Other autoencoder, also a tiny one (TAESD; none ships here): file or folder."),
        Flag(("--tiny-vae",), "FILE"),
    ] = None
    base: Annotated[
        str | None,
        Field(min_length=1, description="Where to take what the file lacks: a model, or files parted by commas."),
        Flag(value="MODEL"),
    ] = None
    preset: Annotated[
        str | None,
        Field(
            description="Which it is of the models that look alike, such as sdxl-lightning (default: what names and "
            "the scheduler say)."
        ),
        Flag(value="NAME"),
    ] = None
    t5: Annotated[
        str | None,
        Field(
            description="T5 of Stable Diffusion 3: off (not read, zeros instead), cpu (there layer by layer while it "
            "reads), keep (there all the time) (default: as --memory has it)."
        ),
    ] = None
    prediction: Annotated[
        str | None, Field(description="What the network predicts, eps or v (default: what the model's files say).")
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _registered_names(cls, given: Any) -> Any:
        """Sampler and spacing by any of their names; a sampler's may go on to say the spacing."""
        if not isinstance(given, dict) or not (given.get("sampler") or given.get("spacing")):
            return given
        from sfumato.diffusion.names import find_sampler, find_spacing

        sampler, spacing = given.get("sampler"), given.get("spacing")
        said = None
        if isinstance(sampler, str):
            sampler, said = find_sampler(sampler)
        if isinstance(spacing, str):
            spacing = None if spacing.lower() == "automatic" else find_spacing(spacing)
        return {**given, "sampler": sampler, "spacing": spacing or said}

    @field_validator("prediction")
    @classmethod
    def _known_prediction(cls, name: str | None) -> str | None:
        if name is not None:
            from sfumato.diffusion.prediction import get_prediction

            get_prediction(name)
        return name

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, name: str | None) -> str | None:
        if name is not None:
            from sfumato.presets import check_name

            check_name(name)
        return name

    @field_validator("prompt_rule")
    @classmethod
    def _known_rule(cls, name: str | None) -> str | None:
        if name is not None:
            from sfumato.text.prompt import check_rule

            check_rule(name)
        return name

    @model_validator(mode="after")
    def _one_rule_of_guidance(self) -> Request:
        if self.cfg_pp is not None and self.apg is not None:
            raise ValueError(
                f"cfg_pp = {self.cfg_pp:g} and apg = {typed(self.apg)} each say what is made of prompt and negative "
                "prompt; give one of the two"
            )
        return self

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _readable(cls, text: str, info: ValidationInfo) -> str:
        words = len(text.split())
        if words > MAX_WORDS or len(text) > MAX_LETTERS:
            raise ValueError(
                f"{info.field_name} has {words} words and {len(text)} letters; at most {MAX_WORDS} words and "
                f"{MAX_LETTERS} letters are read, so say it in fewer"
            )
        return text

    @field_validator("outpaint")
    @classmethod
    def _four_sides(cls, sides: tuple[int, ...] | None) -> tuple[int, ...] | None:
        sides = sides * 4 if sides is not None and len(sides) == 1 else sides
        if sides is not None and not (len(sides) == 4 and min(sides) >= 0 and 0 < max(sides) <= MAX_SIDE):
            raise ValueError(
                f"outpaint = {','.join(map(str, sides))}; give one number of pixels, or four for left, right, top and "
                f"bottom, from 0 to {MAX_SIDE} and not all 0"
            )
        return sides

    @field_validator("masked_content", "hires_upscaler", "t5")
    @classmethod
    def _known_choice(cls, name: str | None, info: ValidationInfo) -> str | None:
        known = CHOICES[str(info.field_name)]
        if name is not None and name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ";"
            raise ValueError(f"unknown {info.field_name} {name!r}{hint} known: {', '.join(known)}")
        return name

    @model_validator(mode="after")
    def _seeds_in_range(self) -> Request:
        for name in ("seed", "variation_seed"):
            first = getattr(self, name)
            if first is not None and first + self.num_images - 1 > MAX_SEED:
                raise ValueError(
                    f"{name} = {first} with {self.num_images} pictures passes the largest seed, {MAX_SEED}"
                )
        return self

    def resolved(self, preset: Preset) -> Request:
        """The same wish with the model's preferences filled in and, when no seed was given, a random one."""
        filled = {name: value for name, value in preset.defaults().items() if getattr(self, name) is None}
        if self.seed is None:
            # Short enough to be typed again.
            filled["seed"] = random.SystemRandom().randrange(2**32)
        if self.variation_strength is not None and self.variation_seed is None:
            filled["variation_seed"] = random.SystemRandom().randrange(2**32)
        return self.model_copy(update=filled)

    def singles(self) -> list[Request]:
        """One request a picture, each with its own seed; what is stored in the picture's PNG.

        Variations have one seed, and a variation seed each. A prompt matrix has a prompt each with the same seeds.
        """
        if self.seed is None:
            raise ValueError("the request has no seed yet; call resolved(preset) first")
        name = "variation_seed" if self.variation_strength else "seed"
        first = getattr(self, name)
        seeds = [{name: first + i, "num_images": 1, "prompt_matrix": False} for i in range(self.num_images)]
        prompts = prompts_of(self.prompt) if self.prompt_matrix else [self.prompt]
        return [self.model_copy(update={"prompt": prompt, **seed}) for prompt in prompts for seed in seeds]


def parse(**fields: Any) -> Request:
    """Build a request; raises ValueError with one line for each thing that is wrong."""
    try:
        return Request(**fields)
    except ValidationError as error:
        raise ValueError("; ".join(_worded(e) for e in error.errors())) from None


def _worded(error: Any) -> str:
    field = ".".join(str(part) for part in error["loc"])
    if error["type"] == "value_error":  # from a validator above, a whole sentence already
        return str(error["ctx"]["error"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(field, Request.model_fields, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ";"
        return f"unknown option {field!r}{hint} known: {', '.join(Request.model_fields)}"
    value = repr(error["input"])
    value = value if len(value) <= 80 else f"{value[:76]}...{value[-1]}"
    return f"{field} = {value}: {error['msg'][0].lower()}{error['msg'][1:]}"
