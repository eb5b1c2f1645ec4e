# %% [markdown]
# # Depth
#
# A depth model sees, beside the noisy picture, how near each of its places is, and keeps that while all else changes.
#
# The released one is `stabilityai/stable-diffusion-2-depth`, which `sfumato.load` opens by that name, or from its file
# (`512-depth-ema`). It estimates the depth itself when none is given. **It is not in the package, and the built-in
# model does not know depth.** To have something that runs, the built-in model is given one channel more here, with
# weights of zero; in this way the released one was begun, before its training. Ours is not trained: it reads the depth
# and does not heed it. What this example shows is how everything is called, and what the network is told.

# %%
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import sfumato
from sfumato.images import grid, to_tensor
from sfumato.models.depth import depth_channel
from sfumato.models.unet import UNet
from sfumato.weights.parts import Components

OUTPUTS = Path("outputs")
OUTPUTS.mkdir(exist_ok=True)


def show(image: Image.Image, name: str) -> Image.Image:
    """Save a picture; in a notebook it is also shown, being the value of its cell."""
    image.save(OUTPUTS / name)
    return image


# %% [markdown]
# A picture, and its depth: a ball before a wall, the nearer the brighter.

# %%
picture = Image.new("RGB", (128, 128), "lightblue")
ImageDraw.Draw(picture).ellipse([24, 24, 104, 104], fill="orange")
depth = Image.new("L", (128, 128))
for radius in range(40, 0, -1):
    box = [64 - radius, 64 - radius, 64 + radius, 64 + radius]
    ImageDraw.Draw(depth).ellipse(box, fill=100 + round(155 * (1 - (radius / 40) ** 2) ** 0.5))
show(grid([picture, depth], columns=2), "05_picture_and_depth.png")

# %% [markdown]
# The U-Net is told of it at the size of latents, as one number a place from -1 to 1.

# %%
told = depth_channel(to_tensor([depth])[:, :1], 16, 16)  # (1, 1, 16, 16)
levels = ((told[0, 0] + 1) * 127.5).round().byte()
print(told.shape, f"from {told.min():g} to {told.max():g}")
show(Image.fromarray(levels.numpy()).resize((128, 128), Image.Resampling.NEAREST), "05_told.png")

# %% [markdown]
# The model with a channel more. With the released one, this cell is
# `pipe = sfumato.load("stabilityai/stable-diffusion-2-depth")`.

# %%
mini = sfumato.load()
unet = UNet(replace(mini.unet.config, in_channels=5)).to(mini.runtime.device, mini.runtime.dtype).eval()
weights = dict(mini.unet.state_dict())
first = weights["conv_in.weight"]  # (48, 4, 3, 3)
weights["conv_in.weight"] = torch.cat([first, torch.zeros_like(first[:, :1])], dim=1)  # (48, 5, 3, 3)
unet.load_state_dict(weights)
parts = Components(unet, mini.vae, mini.text_encoder, mini.tokenizer, mini.scheduler)
pipe = sfumato.Pipeline(replace(parts, pipeline="StableDiffusionDepth2ImgPipeline"))

# %% [markdown]
# And the call. `strength` is that of image to image; a trained model would keep the ball's shape at 1, too.

# %%
prompts = ["a tomato on a light blue background", "a basketball on a light blue background"]
steps = {"strength": 0.6, "guidance_scale": 3.5, "seed": 5, "num_inference_steps": 10}
images = pipe(prompts, image=picture, depth=depth, **steps).images
show(grid([picture, depth, *images], columns=4), "05_depth_to_image.png")

# %% [markdown]
# As was said: with weights of zero these are, up to rounding, the pictures that image to image gives.

# %%
plain = mini(prompts, image=picture, **steps).images
pairs = [zip(a.tobytes(), b.tobytes(), strict=True) for a, b in zip(images, plain, strict=True)]
difference = max(abs(a - b) for pair in pairs for a, b in pair)
print(f"largest difference from image to image: {difference} of 255")
