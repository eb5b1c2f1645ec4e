# %% [markdown]
# # Restoration
#
# Noise, holes, blur and too few pixels are taken out of a picture by what a model knows of pictures. For this the
# package has a second small model, of pixels, trained on drawings of the same kind. It needs no prompt.

# %%
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from sfumato.images import grid
from sfumato.pipelines.restore import restore

OUTPUTS = Path("outputs")
OUTPUTS.mkdir(exist_ok=True)


def show(image: Image.Image, name: str) -> Image.Image:
    """Save a picture; in a notebook it is also shown, being the value of its cell."""
    image.save(OUTPUTS / name)
    return image


# %% [markdown]
# A drawing to be spoilt in four ways.

# %%
large = Image.new("RGB", (512, 512), "lightblue")
draw = ImageDraw.Draw(large)
draw.polygon([(256, 60), (80, 230), (432, 230)], fill="firebrick")
draw.rectangle([120, 230, 392, 440], fill="khaki")
draw.rectangle([220, 320, 292, 440], fill="saddlebrown")
draw.ellipse([150, 260, 200, 310], fill="steelblue")
draw.ellipse([312, 260, 362, 310], fill="steelblue")
house = large.resize((128, 128), Image.Resampling.LANCZOS)
show(house, "06_house.png")

# %% [markdown]
# **Noise.** How strong it is, is estimated from the picture.

# %%
rng = np.random.default_rng(0)
levels = np.asarray(house, np.float32)
noisy = Image.fromarray((levels + 25 * rng.standard_normal(levels.shape)).clip(0, 255).astype(np.uint8))
clean = restore(noisy)
print(f"taken for {clean.damage.name} of {clean.damage.noise:.2f}")
show(grid([noisy, clean.image, house], columns=3), "06_noise.png")

# %% [markdown]
# **Holes.** Two pixels of three are missing; the mask is white there.

# %%
missing = rng.random((128, 128)) < 0.67
mask = Image.fromarray((255 * missing).astype(np.uint8))
holed = Image.composite(Image.new("RGB", house.size), house, mask)
filled = restore(holed, mask=mask, noise=0).image
show(grid([holed, filled, house], columns=3), "06_holes.png")

# %% [markdown]
# **Blur**, of which the deviation is known: two pixels.

# %%
blurred = house.filter(ImageFilter.GaussianBlur(2))
sharp = restore(blurred, blur=2.0, noise=0.01).image
show(grid([blurred, sharp, house], columns=3), "06_blur.png")

# %% [markdown]
# **Few pixels**: four times larger along each side.

# %%
small = house.resize((32, 32), Image.Resampling.BOX)
enlarged = restore(small, scale=4).image
show(grid([small.resize((128, 128), Image.Resampling.NEAREST), enlarged, house], columns=3), "06_few_pixels.png")
