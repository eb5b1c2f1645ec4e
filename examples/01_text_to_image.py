# %% [markdown]
# # Text to image
#
# A prompt becomes a picture, with the model that is inside the package: nothing is downloaded. It is small, knows
# [115 things](../src/sfumato/data/concepts.yaml) and draws them softly.

# %%
from pathlib import Path

from PIL import Image

import sfumato
from sfumato.images import grid, read_recipe, save

OUTPUTS = Path("outputs")
OUTPUTS.mkdir(exist_ok=True)


def show(image: Image.Image, name: str) -> Image.Image:
    """Save a picture; in a notebook it is also shown, being the value of its cell."""
    image.save(OUTPUTS / name)
    return image


pipe = sfumato.load()

# %% [markdown]
# The seed decides the noise that the picture begins with. The same seed gives the same picture again.

# %%
result = pipe("a strawberry on a light blue background", seed=2, num_inference_steps=8)
show(result.images[0], "01_strawberry.png")

# %% [markdown]
# Several prompts in one call:

# %%
prompts = [
    "a gift on a green background",
    "a pink star on a yellow background",
    "a rainbow",
    "three apples on a yellow background",
]
garden = pipe(prompts, seed=40, num_inference_steps=8)
show(grid(garden.images, columns=4), "01_prompts.png")

# %% [markdown]
# `guidance_scale` says how much the prompt weighs. Little gives pale pictures, much gives glaring ones.

# %%
scales = [1, 3.5, 8, 14]
foxes = [
    pipe("a fox on a yellow background", seed=40, num_inference_steps=8, guidance_scale=scale).images[0]
    for scale in scales
]
show(grid(foxes, columns=4), "01_guidance.png")

# %% [markdown]
# Each picture comes with the request that made it. Saved with the picture, it is a recipe, from which
# the picture can be made again: here, or in the shell with `sfumato replay outputs/01_recipe.png`.

# %%
save(result.images[0], OUTPUTS / "01_recipe.png", result.requests[0])
recipe = read_recipe(OUTPUTS / "01_recipe.png")
again = pipe.generate(recipe).images[0]
print(recipe.prompt, recipe.seed, recipe.sampler, "the same picture:", again == result.images[0])
