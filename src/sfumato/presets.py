"""What each released model prefers when a request leaves it open."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Preset:
    """The defaults of one model; sizes in pixels, spacing None stands for the scheduler's own."""

    name: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    sampler: str
    spacing: str | None = None

    def defaults(self) -> dict[str, int | float | str | None]:
        """The preferences by the names of Request's fields."""
        return {
            "width": self.width,
            "height": self.height,
            "num_inference_steps": self.num_inference_steps,
            "guidance_scale": self.guidance_scale,
            "sampler": self.sampler,
            "spacing": self.spacing,
        }


MINI = Preset("mini", 128, 128, num_inference_steps=20, guidance_scale=3.5, sampler="dpmpp_2m")
SD1 = Preset("sd1", 512, 512, num_inference_steps=25, guidance_scale=7.5, sampler="dpmpp_2m")
SD2 = Preset("sd2", 768, 768, num_inference_steps=25, guidance_scale=7.5, sampler="dpmpp_2m")
# Told apart by the width of the text states that the U-Net reads.
BY_CONTEXT = {256: MINI, 768: SD1, 1024: SD2}
BUILT_IN = {"mini": Path(__file__).parent / "assets" / "mini"}


def detect(cross_attention_dim: int | tuple[int, ...], side: int, spacing: str) -> Preset:
    """The preset of a model folder.

    cross_attention_dim: the U-Net's. side: of its training pictures, in pixels. spacing: its scheduler's.
    A model that is none of the released ones gets SD 1's preferences at its own size.
    """
    width = cross_attention_dim if isinstance(cross_attention_dim, int) else cross_attention_dim[0]
    known = BY_CONTEXT.get(width, replace(SD1, name="custom"))
    return replace(known, width=side, height=side, spacing=spacing)


def model_folder(model: str | Path) -> Path:
    """The folder of a built-in model's name, or the path itself.

    Raises FileNotFoundError saying what to do when there is neither.
    """
    if Path(model).is_dir():
        return Path(model)
    built_in = BUILT_IN.get(str(model))
    if built_in is None:
        raise FileNotFoundError(
            f"no model folder {str(model)!r}; give a folder or a built-in model: {', '.join(BUILT_IN)}"
        )
    if not built_in.is_dir():
        raise FileNotFoundError(
            f"the built-in model {str(model)!r} is not in this installation ({built_in}): "
            "reinstall the package, train it with `sfumato train recipes/mini.yaml`, or name a model folder"
        )
    return built_in
