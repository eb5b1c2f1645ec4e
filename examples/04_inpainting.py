# %% [markdown]
# # Inpainting
#
# A part of a picture is painted anew, and the rest is kept: exactly, to the last bit, but for a soft rim around the
# mask (`mask_blur`).

# %%
from pathlib import Path

from PIL import Image, ImageDraw

import sfumato
from sfumato.images import grid

OUTPUTS = Path("outputs")
OUTPUTS.mkdir(exist_ok=True)


def show(image: Image.Image, name: str) -> Image.Image:
    """Save a picture; in a notebook it is also shown, being the value of its cell."""
    image.save(OUTPUTS / name)
    return image


pipe = sfumato.load()

# %% [markdown]
# The picture to be changed, and a mask that is white where it may be.

# %%
picture = pipe("a red balloon on a light blue background", seed=40, num_inference_steps=8).images[0]
mask = Image.new("L", picture.size)
ImageDraw.Draw(mask).ellipse([16, 8, 112, 104], fill=255)
show(grid([picture, mask], columns=2), "04_picture_and_mask.png")

# %% [markdown]
# The built-in model was not made for inpainting. Any model can do it: what is outside of the mask is put back under
# the right amount of noise at every step. Models that were made for it (`--model` with nine input channels) are taken
# in the same way, and see the mask.

# %%
things = ["a yellow star", "a sunflower", "a blue heart", "a penguin"]
changed = [
    pipe(f"{thing} on a light blue background", image=picture, mask=mask, seed=4, num_inference_steps=8).images[0]
    for thing in things
]
show(grid([picture, *changed], columns=5), "04_changed.png")

# %% [markdown]
# The corners, far from the mask, have not changed at all.

# %%
corner = (0, 108, 20, 128)
print("kept:", all(image.crop(corner) == picture.crop(corner) for image in changed))

# %% [markdown]
# Outpainting is the same with the mask outside of the picture: here 128 pixels are added at the left.

# %%
prompt = "a rainbow on a light blue background"
wide = pipe(prompt, image=picture, outpaint=(128, 0, 0, 0), seed=1, num_inference_steps=10).images[0]
show(wide, "04_outpainted.png")
