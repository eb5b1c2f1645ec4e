# %% [markdown]
# # The components, one by one
#
# A pipeline is a tokenizer, a text encoder, a U-Net, an autoencoder and a scheduler. Here they are called by hand, and
# at the end the loop of one's own has made the very picture that the pipeline makes.

# %%
from pathlib import Path

import torch
from PIL import Image, ImageDraw

import sfumato
from sfumato.images import grid, to_pil, to_tensor

OUTPUTS = Path("outputs")
OUTPUTS.mkdir(exist_ok=True)


def show(image: Image.Image, name: str) -> Image.Image:
    """Save a picture; in a notebook it is also shown, being the value of its cell."""
    image.save(OUTPUTS / name)
    return image


pipe = sfumato.load(device="cpu", precision="float32")
tokenizer, text_encoder, unet, vae = pipe.tokenizer, pipe.text_encoder, pipe.unet, pipe.vae
prompt, steps, guidance_scale, seed = "a pink star on a yellow background", 8, 3.5, 40

# %% [markdown]
# **The tokenizer** cuts a text into pieces that have numbers, and fills up to a fixed length.

# %%
ids = tokenizer([prompt, ""])  # (2, L): the prompt, and the empty one that guidance leads away from
print(ids.shape, tokenizer.decode(ids[0]))

# %% [markdown]
# **The text encoder** turns each piece into a vector that knows its neighbours.

# %%
with torch.no_grad():
    states = text_encoder(ids).last_hidden_state  # (2, L, D)
print(states.shape)

# %% [markdown]
# **The autoencoder** writes a picture as a latent, eight times smaller along each side, and reads it back. What the
# U-Net denoises are latents; `scaling_factor` brings them to about unit variance. Here are three circles, and what
# is left of them after both ways.

# %%
drawn = Image.new("RGB", (128, 128), "lightblue")
for colour, left in (("crimson", 10), ("gold", 46), ("seagreen", 82)):
    ImageDraw.Draw(drawn).ellipse([left, 46, left + 36, 82], fill=colour)
pixels = to_tensor([drawn])  # (1, 3, 128, 128) in [-1, 1]
with torch.no_grad():
    z = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor  # (1, 4, 16, 16)
    back = vae.decode(z / vae.config.scaling_factor).sample  # (1, 3, 128, 128)
print(z.shape)
show(grid([drawn, to_pil(back)[0]], columns=2), "02_autoencoder.png")

# %% [markdown]
# **The U-Net** is asked at every step what it sees in the noise, with the prompt and without. Guidance goes on from
# the one answer in the direction of the other. **The scheduler** takes the step. `pred_original_sample` is the clean
# picture as it is foreseen at each step.

# %%
scheduler = sfumato.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
scheduler.set_timesteps(steps)
x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(seed)) * scheduler.init_noise_sigma
foreseen = []
with torch.no_grad():
    for t in scheduler.timesteps:
        both = scheduler.scale_model_input(torch.cat([x, x]), t)  # (2, 4, 16, 16)
        with_prompt, without = unet(both, t, encoder_hidden_states=states).sample.chunk(2)
        out = without + guidance_scale * (with_prompt - without)
        step = scheduler.step(out, t, x)
        x = step.prev_sample
        foreseen += to_pil(vae.decode(step.pred_original_sample / vae.config.scaling_factor).sample)
    (image,) = to_pil(vae.decode(x / vae.config.scaling_factor).sample)
show(grid(foreseen, columns=4), "02_foreseen.png")

# %% [markdown]
# The pipeline's own picture is the same, up to rounding.

# %%
theirs = pipe(prompt, seed=seed, num_inference_steps=steps, guidance_scale=guidance_scale).images[0]
difference = max(abs(a - b) for a, b in zip(image.tobytes(), theirs.tobytes(), strict=True))
print(f"largest difference: {difference} of 255")
show(grid([image, theirs], columns=2), "02_own_loop.png")
