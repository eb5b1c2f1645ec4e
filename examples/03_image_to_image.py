# %% [markdown]
# # Image to image
#
# A picture instead of pure noise to begin with. `strength` says how far to leave it: at 0.2 a sketch is cleaned up a
# little, at 1 nothing of it remains.

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
# A sketch of a few shapes; any picture or path will do.

# %%
sketch = Image.new("RGB", (128, 128), "lightblue")
draw = ImageDraw.Draw(sketch)
draw.polygon([(64, 112), (26, 50), (102, 50)], fill="crimson")
draw.ellipse([26, 30, 66, 66], fill="crimson")
draw.ellipse([62, 30, 102, 66], fill="crimson")
draw.polygon([(40, 36), (64, 18), (88, 36), (64, 46)], fill="green")
show(sketch, "03_sketch.png")

# %% [markdown]
# The sketch, then strengths of 0.2, 0.4, 0.6 and 0.8.

# %%
strengths = [0.2, 0.4, 0.6, 0.8]
prompt = "a strawberry on a light blue background"
steps = {"seed": 3, "num_inference_steps": 10}
berries = [pipe(prompt, image=sketch, strength=strength, **steps).images[0] for strength in strengths]
show(grid([sketch, *berries], columns=5), "03_strengths.png")

# %% [markdown]
# The prompt may ask for something else than the sketch shows. Its colours and places last longest.

# %%
others = [
    pipe(f"{thing} on a light blue background", image=sketch, strength=0.5, **steps).images[0]
    for thing in ("a heart", "a tomato", "a rose", "a balloon")
]
show(grid([sketch, *others], columns=5), "03_others.png")
